"""The tables of docs/results.md, made from what was measured.

    python -m utils.tables keep logs/mer/NAME ...    puts the records of completed runs into docs/results/, and those of
                                                     utils.meta_test into docs/results/omniglot/
    python -m utils.tables                           writes the tables in docs/results.md anew

A table stands between the lines `<!-- table STREAM -->` and `<!-- end -->` and has a row for every row of papers/ on
that stream that was measured, or, `<!-- table omniglot -->`, for every meta-test that was kept; a figure within text is
written `<!-- RECORD METRIC -->...<!-- end -->`.
"""

import json
import re
import sys
from pathlib import Path

from dataloaders.registry import DATASETS
from model.registry import ALGORITHMS
from utils import atomic, experiments, papers
from utils.command_line import one_sentence, show
from utils.config import MAY_CHANGE, configure
from utils.errors import UserError, nearest
from utils.loop import AGNOSTIC

ROOT = papers.FOLDER.parent
FOLDER, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "results.md"
RA, LA, BTI = "retained_accuracy", "learning_accuracy", "backward_transfer_and_interference"
HARMLESS = MAY_CHANGE | {"expt_name", "log_every", "log_alignment", "evaluate_tasks", "evaluate_after"}
HEADER = ("", "published", "its program", "**default**", "as published", "learning accuracy", "BTI")
IMAGES_HEADER = (
    *("", "published", "**default**", "as published", "learning accuracy", "published BTI", "BTI", "task-agnostic"),
    *("minutes", "memory", "device"),
)
META_TEST, ORDERS = "meta_test.json", ("first_order", "second_order")
MARK = re.compile(r"(<!-- (?!end)(.+?) -->)(.*?)(<!-- end -->)", re.DOTALL)


def keep(folder: Path) -> Path:
    """Writes what is worth keeping of a completed run, or of a meta-test, into docs/results/; returns the file."""
    if (folder / META_TEST).exists():
        return _keep_meta_test(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text())
        seed = next(iter(summary["status_of_seeds"]))
        parameters = json.loads((folder / seed / "training_parameters.json").read_text())
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{folder} is no record of a run ({error}): give a folder that has a summary.json.") from None
    if summary["status"] != "completed":
        raise UserError(f"the run in {folder} is {summary['status']}: only completed runs are kept.")
    name = next((row.name for row in papers.rows() if _is(row, summary, parameters["options"])), None)
    if name is None:
        raise UserError(f"no row of papers/ has the settings of {folder}: add one, or keep the record elsewhere.")
    kept = {key: summary[key] for key in ("model", "dataset", "as_published", "metrics", "evaluated_on")}
    kept |= {key: parameters[key] for key in ("commit", "versions", "machine", "options", "seeds")}
    kept |= {key: summary[key] for key in ("train_seconds", "evaluation_seconds", "peak_memory_bytes", "status")}
    path = FOLDER / f"{name}{'-as_published' * summary['as_published']}.json"
    atomic.write_text(path, json.dumps(kept, indent=1) + "\n")
    return path


def _keep_meta_test(folder: Path) -> Path:
    try:
        content = json.loads((folder / META_TEST).read_text())
        network, head = content["networks"][0], content["options"]["head"]
        trained = network["options"]
        parts = [network["model"], "" if trained["gate"] else "no_gate", ORDERS[trained["second_order"]]]
        parts += [f"{trained['channels']}_channels", f"alpha_{trained['alpha_init']:g}"]
        parts += [str(trained["meta_iterations"]), head]
        name = "-".join(part for part in parts if part)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder / META_TEST} is no record of a meta-test ({error!r}): run it again.") from None
    for place in ("networks", "out", "data_path", "file"):  # where things lay is of no interest elsewhere
        for told in (content["options"], *content["networks"]):
            told.pop(place, None)
    path = FOLDER / "omniglot" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    atomic.write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def meta_tests() -> str:
    """The table of the meta-tests that were kept: held-out accuracy by the number of classes learnt."""
    records = [json.loads(path.read_text()) for path in sorted((FOLDER / "omniglot").glob("*.json"))]
    lengths = sorted({row["classes"] for record in records for row in record["results"]})
    header = ["", "meta-training", "inner rate", "head", *(f"{n} classes" for n in lengths), "what was learnt", "runs"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for record in records:
        network, results = record["networks"][0], {row["classes"]: row for row in record["results"]}
        o, last = network["options"], results[max(results)]
        cells = [f"`{network['model']}`" + ("" if network["model"] != "anml" or o["gate"] else ", no gate")]
        channels = "" if o["channels"] == 256 else f", {o['channels']} channels"
        cells += [f"{o['meta_iterations']:,}, {ORDERS[o['second_order']].replace('_', ' ')}{channels}"]
        cells += [f"{o['alpha_init']:g}", record["options"]["head"]]
        found = [results.get(n) for n in lengths]
        cells += [_text(row["test"]["mean"], row["test"]["std"]) if row else "–" for row in found]
        cells += [_text(last["train"]["mean"], last["train"]["std"])]
        cells += [f"{len(record['networks'])} × {record['options']['runs']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _is(row: papers.Row, summary: dict, options: dict) -> bool:
    """Whether a run with these options is what the row stands for, but for seeds and what changes no number.

    An option that the record lacks is one that the program of its day did not have.
    """
    if (row.model, row.dataset) != (summary["model"], summary["dataset"]):
        return False
    config = configure(experiments.arguments(row, ["--as_published"] if summary["as_published"] else []))
    wanted = {name: value for name, value in config.values.items() if name not in HARMLESS}
    return all(options.get(name, value) == value for name, value in wanted.items())


def _text(mean: float, std: float | None = None) -> str:
    """Fractions without the zero before the point."""
    numbers = [f"{value:.4f}".replace("0.", ".", 1) for value in (mean, std) if value is not None]
    return " ± ".join(numbers)


def _record(name: str) -> dict | None:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def measured(name: str, metric: str = RA, seeds: int = 5) -> str:
    """Mean ± standard deviation over seeds, of the record of this name; a dash if there is none.

    The number of seeds is told where it is not `seeds`.
    """
    record = _record(name)
    if record is None:
        return "–"
    if metric not in record["metrics"]:
        raise UserError(f"{metric} is not known: {nearest(metric, record['metrics'])}.")
    found, n = record["metrics"][metric], len(record["seeds"])
    if found["mean"] is None:
        return "–"
    return _text(found["mean"], found["std"]) + (f" ({n} seed{'s' * (n > 1)})" if n != seeds else "")


def _cost(name: str) -> dict[str, str]:
    """What the record of this name took, all seeds together."""
    record = _record(name)
    if record is None:
        return dict.fromkeys(("minutes", "memory", "device"), "–")
    minutes = (record["train_seconds"] + record["evaluation_seconds"]) / 60
    memory = f"{record['peak_memory_bytes'] / 1e9:.1f} GB"
    return {"minutes": f"{minutes:.0f}", "memory": memory, "device": record["options"]["device"]}


def table(dataset: str) -> str:
    """The Markdown table of one stream."""
    images = DATASETS[dataset].images
    header = IMAGES_HEADER if images else HEADER
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in papers.rows():
        modes = ("", "-as_published")
        if row.dataset != dataset or not any((FOLDER / f"{row.name}{mode}.json").exists() for mode in modes):
            continue
        seeds, variant = len(row.seeds), row.variant.replace("memory", "memory ").replace("_", " ")
        deviates = ALGORITHMS[row.model].deviations(images)
        cells = {
            "": f"`{row.model}`" + (f", {variant}" if variant else ""),
            "published": _text(*row.published[RA]) if RA in row.published else "–",
            "its program": ", ".join(f"{value:.3f}".lstrip("0") for value in row.program.get(RA, ())) or "–",
            "**default**": f"**{measured(row.name, RA, seeds)}**",
            "as published": measured(f"{row.name}-as_published", RA, seeds) if deviates else "the same",
            "learning accuracy": measured(row.name, LA, seeds),
            "published BTI": _text(*row.published[BTI]) if BTI in row.published else "–",
            "BTI": measured(row.name, BTI, seeds),
        }
        if images:
            cells["task-agnostic"] = measured(row.name, RA + AGNOSTIC, seeds)
            cells |= _cost(row.name)
        lines.append("| " + " | ".join(cells[title] for title in header) + " |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with its tables and figures as docs/results/ has them now."""

    def write(match: re.Match) -> str:
        kind, _, rest = match[2].partition(" ")
        if kind == "table":
            return f"{match[1]}\n{meta_tests() if rest == 'omniglot' else table(rest)}\n{match[4]}"
        content = measured(kind, rest or RA)
        if content == "–":
            raise UserError(f"docs/results/ has no {kind}.json: correct the name in docs/results.md, or keep the run.")
        return match[1] + content + match[4]

    return MARK.sub(write, page)


def main(argv: list[str]) -> int:
    """Keeps the records that are named after "keep", if any, and writes the tables. Returns the exit code."""
    if argv[:1] in (["--help"], ["-h"]):
        show(__doc__.strip())
    if argv[:1] == ["keep"]:
        for folder in argv[1:]:
            print(keep(Path(folder)))
    elif argv:
        raise UserError(f"{argv[0]!r} is not known: give nothing, or keep FOLDER ...")
    atomic.write_text(PAGE, filled(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    with one_sentence("utils.tables"):
        sys.exit(main(sys.argv[1:]))
