import subprocess
from pathlib import Path

import pytest

from main import main as run_main
from utils import experiments, papers
from utils.config import configure

ROOT = Path(__file__).parent.parent
ROWS = papers.rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_resolves_to_its_settings(row):
    config = configure(experiments.arguments(row, []))
    assert (config.algorithm.name, config.dataset.name, config.seeds) == (row.model, row.dataset, row.seeds)
    for name, value in row.settings.items():
        assert config.values[name] == value and config.sources[name] in (row.file, "command line")


def test_rows_are_unique_and_published_numbers_are_fractions_of_known_metrics():
    import utils.metrics

    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        for metric, value in row.published.items():
            assert f"    {metric} " in utils.metrics.__doc__
            assert all(-1 <= number <= 1 for number in value)


def test_the_defaults_of_a_pair_are_the_row_without_a_variant():
    assert papers.default_row("er", "mnist_rotations").settings["memories"] == 200
    assert papers.default_row("er", "nowhere") is None


def test_what_is_recorded_is_skipped_until_a_setting_changes(tmp_path, capsys):
    size = ["--n_tasks", "2", "--samples_per_task", "20", "--log_dir", str(tmp_path / "a folder")]

    def pending(*extra):
        lines = experiments.pending("lamaml", "digits_rotations", [*size, *extra])
        assert ("skipped" in capsys.readouterr().err) == (not lines)
        return lines

    (line,) = pending()
    assert line[:4] == ["--model", "lamaml", "--dataset", "digits_rotations"]
    assert run_main(line).exit_code == 0
    capsys.readouterr()
    assert pending() == pending("--log_every", "1") == []
    assert pending("--as_published") != [] and pending("--glances", "1") != [] and pending("--seed", "0") != []
    (summary,) = tmp_path.rglob("summary.json")
    summary.write_text("{")  # a torn record is not a record
    assert pending() == [line]


@pytest.mark.parametrize(("codes", "runs", "result"), [([0, 3, 0], None, 3), ([0, 130], 2, 130), ([], None, 0)])
def test_a_failed_row_is_told_at_the_end_and_ctrl_c_ends_all(codes, runs, result, tmp_path, monkeypatch):
    asked = []

    def run(line):
        asked.append(line)
        return codes.pop(0) if codes else 0

    monkeypatch.setattr(experiments, "_run", run)
    assert experiments.main(["all", "mnist_manypermutations", "--log_dir", str(tmp_path)]) == result
    assert len(asked) == (runs or sum(row.dataset == "mnist_manypermutations" for row in ROWS))


@pytest.mark.parametrize(
    ("names", "said"),
    [(["lamamml"], "lamaml"), (["lamaml", "mnist"], "mnist_rotations"), (["nosuch"], "choose one of")],
)
def test_mistakes_are_named(names, said):
    with pytest.raises(experiments.UserError, match=said):
        experiments.main(names)


def test_the_script_lists_what_it_can_run_and_holds_no_settings():
    done = subprocess.run([ROOT / "run_experiments.sh"], capture_output=True, text=True, timeout=120, check=True)
    assert all(row.model in done.stdout and row.dataset in done.stdout for row in ROWS)
    script = (ROOT / "run_experiments.sh").read_text()
    assert not any(f"--{name}" in script for row in ROWS for name in row.settings)
