"""The experiments of papers/ as command lines of main.py, without those that are recorded already.

    python3 -m utils.experiments list
    python3 -m utils.experiments commands MODEL|all [DATASET|all] [options for main.py ...]

run_experiments.sh is the script that people use.
"""

import json
import shlex
import sys
from pathlib import Path

from dataloaders.registry import DATASETS
from model.registry import ALGORITHMS, ALIASES
from utils import papers
from utils.config import Config, configure
from utils.errors import UserError, nearest


def arguments(row: papers.Row, extra: list[str]) -> list[str]:
    """The arguments of main.py that run the row; `extra` wins over its settings."""
    settings = (
        [text for name, value in row.settings.items() for text in (f"--{name}", str(value))] if row.variant else []
    )
    seeds = [] if {"--seed", "--seeds"} & set(extra) else ["--seeds", *map(str, row.seeds)]
    return ["--model", row.model, "--dataset", row.dataset, *seeds, "--expt_name", row.name, *settings, *extra]


def recorded(config: Config) -> Path | None:
    """The record of a completed run that computed what this configuration would, if there is one."""
    for summary in sorted(Path(config.run.log_dir, config.algorithm.name).glob("*/summary.json")):
        try:
            content = json.loads(summary.read_text())
        except (OSError, ValueError):
            continue
        if content.get("status") == "completed" and content.get("identity") == json.loads(
            json.dumps(config.identity())
        ):
            return summary.parent
    return None


def chosen(model: str, dataset: str) -> list[papers.Row]:
    """The rows of an algorithm and a stream, each a name or "all"."""
    model = ALIASES.get(model, model)
    for typed, known in ((model, ALGORITHMS), (dataset, DATASETS)):
        if typed != "all" and typed not in known:
            raise UserError(f"{typed} is not known: {nearest(typed, [*known, 'all'])}.")
    rows = [row for row in papers.rows() if model in ("all", row.model) and dataset in ("all", row.dataset)]
    if not rows:
        raise UserError(f"papers/ has no row for {model} on {dataset}: ./run_experiments.sh lists what there is.")
    return rows


def listing() -> str:
    """Every row, its published retained accuracy, and where it is recorded."""
    lines = [f"{'algorithm':10} {'stream':24} {'variant':12} {'published RA':16} recorded in"]
    for row in papers.rows():
        published = " ± ".join(f"{value:.4f}" for value in row.published.get("retained_accuracy", ())) or "-"
        where = recorded(configure(arguments(row, []))) or "-"
        lines.append(f"{row.model:10} {row.dataset:24} {row.variant:12} {published:16} {where}")
    lines += [
        "",
        "./run_experiments.sh ALGORITHM STREAM [options for main.py, such as --as_published]; all stands for every one",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if argv[:1] == ["list"]:
        print(listing())
        return
    names = [word for word in argv[1:3] if not word.startswith("-")]
    model, dataset = [*names, "all"][:2] if names else ("all", "all")
    extra = argv[1 + len(names) :]
    for row in chosen(model, dataset):
        line = arguments(row, extra)
        if (found := recorded(configure(line))) is not None:
            print(f"{row.name} is recorded in {found}: skipped", file=sys.stderr)
        else:
            print(shlex.join(line))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"run_experiments.sh: {error}", file=sys.stderr)
        sys.exit(2)
