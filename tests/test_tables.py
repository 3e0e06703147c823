import json

import pytest

from utils import tables
from utils.errors import UserError


def test_the_page_says_what_was_measured():
    """docs/results.md is what `python -m utils.tables` makes of docs/results/."""
    assert tables.filled(tables.PAGE.read_text()) == tables.PAGE.read_text()


def test_every_kept_record_is_complete_and_of_a_known_row():
    known = {row.name + mode for row in tables.papers.rows() for mode in ("", "-as_published")}
    for path in tables.FOLDER.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["status"] == "completed" and len(record["metrics"][tables.RA]["values"]) == len(record["seeds"])
        assert any(path.stem == name or path.stem.startswith(f"{name}-") for name in known)


def test_a_run_is_kept_and_appears_in_its_table(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr(tables, "PAGE", tmp_path / "page.md")
    tables.PAGE.write_text(
        "<!-- table digits_rotations -->\n<!-- end -->\nRA <!-- er-digits_rotations -->?<!-- end -->\n"
    )
    result = run("--model er --seeds 0 1 --n_tasks 2 --n_hiddens 8 --batch_size 40 --samples_per_task 300", small=False)
    with pytest.raises(UserError, match="no row of papers/"):
        tables.keep(result.folder)
    result = run("--model er --seeds 0 1 --n_tasks 2", small=False)
    assert tables.main(["keep", str(result.folder)]) == 0
    mean = f"{result.metrics['retained_accuracy'].mean():.4f}".removeprefix("0")
    page = tables.PAGE.read_text()
    assert page.count(f"{mean} ± ") == 2 and "| `er` | – | – | **" in page and "(2 seeds)" in page


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(UserError, match="no record of a run"):
        tables.keep(tmp_path)
    with pytest.raises(UserError, match="not known"):
        tables.main(["kep"])
