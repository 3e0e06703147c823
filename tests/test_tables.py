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
    other = run("--model er --seeds 0 1 --n_tasks 2 --batch_size 40", small=False)
    with pytest.raises(UserError, match="no row of papers/"):
        tables.keep(other.folder)
    result = run("--model er --seeds 0 1", small=False)
    assert tables.main(["keep", str(result.folder)]) == 0
    mean = f"{result.metrics['retained_accuracy'].mean():.4f}".removeprefix("0")
    page = tables.PAGE.read_text()
    assert page.count(f"{mean} ± ") == 2 and "| `er` | – | – | **" in page and "(2 seeds)" in page


def test_a_single_seed_and_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    found = {"mean": 0.5, "std": None, "values": [0.5]}
    unknown = {"mean": None, "std": None, "values": [None]}
    record = {"metrics": {tables.RA: found, "forgetting": unknown}, "seeds": [3]}
    (tmp_path / "er-digits_rotations.json").write_text(json.dumps(record))
    assert tables.measured("er-digits_rotations") == ".5000 (1 seed)"
    assert tables.measured("er-digits_rotations", "forgetting") == "–"
    with pytest.raises(UserError, match="forgeting is not known: did you mean forgetting"):
        tables.measured("er-digits_rotations", "forgeting")
    with pytest.raises(UserError, match=r"has no er-digit_rotations\.json"):
        tables.filled("<!-- er-digit_rotations --><!-- end -->")


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(UserError, match="no record of a run"):
        tables.keep(tmp_path)
    with pytest.raises(UserError, match="not known"):
        tables.main(["kep"])
