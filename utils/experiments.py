"""The experiments of papers/ as command lines of main.py, without those that are recorded already.

run_experiments.sh is the script that people use.
"""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from dataloaders.registry import DATASETS
from model.registry import ALGORITHMS, ALIASES
from utils import papers
from utils.command_line import one_sentence
from utils.config import Config, configure
from utils.errors import UserError, nearest
from utils.run_folder import runs, summary_of

#: Exit codes of a run that was told to stop, as the shell and as Python has them; nothing more is started then.
STOPPED = {130: 130, -2: 130, 143: 143, -15: 143}


def arguments(row: papers.Row, extra: list[str]) -> list[str]:
    """The arguments of main.py that run the row; `extra` wins over its settings."""
    settings = (
        [text for name, value in row.settings.items() for text in (f"--{name}", str(value))] if row.variant else []
    )
    seeds = [] if {"--seed", "--seeds"} & set(extra) else ["--seeds", *map(str, row.seeds)]
    return ["--model", row.model, "--dataset", row.dataset, *seeds, "--expt_name", row.name, *settings, *extra]


def recorded(config: Config) -> Path | None:
    """The record of a completed run that computed what this configuration would, if there is one."""
    wanted = json.loads(json.dumps(config.identity()))
    defaults = {name: value for name, value in config.with_defaults({}).items() if name in wanted}
    for folder in runs(config):
        content = summary_of(folder)
        if content.get("status") == "completed" and {**defaults, **content.get("identity", {})} == wanted:
            return folder
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


def pending(model: str, dataset: str, extra: list[str]) -> list[list[str]]:
    """The arguments of main.py for every chosen row that is not recorded yet."""
    lines = [(row, arguments(row, extra)) for row in chosen(model, dataset)]
    found = [(row, line, recorded(configure(line))) for row, line in lines]
    for row, _, where in found:
        if where is not None:
            print(f"{row.name} is recorded in {where}: skipped", file=sys.stderr)
    return [line for _, line, where in found if where is None]


def _run(line: list[str]) -> int:
    """main.py with these arguments, in a process of its own; returns its exit code.

    It must not be killed when this process is told to stop: a terminal's Ctrl-C reaches both, SIGTERM is passed on.
    """
    with subprocess.Popen([sys.executable, "main.py", *line], cwd=papers.FOLDER.parent) as process:
        before = {
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        }
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def main(argv: list[str]) -> int:
    """Lists the rows, or runs those named, one after the other. Returns the exit code of the last run that failed.

    argv: nothing, or an algorithm or "all", then perhaps a stream or "all", then options for main.py.
    """
    if not argv:
        print(listing())
        return 0
    names = [word for word in argv[:2] if not word.startswith("-")]
    model, dataset = [*names, "all", "all"][:2]
    failed = 0
    for line in pending(model, dataset, argv[len(names) :]):
        print(f"main.py {shlex.join(line)}", flush=True)
        line = line if "--resume" in line else [*line, "--resume", "auto"]
        code = _run(line)
        if code in STOPPED:
            return STOPPED[code]
        failed = code or failed
    return failed


if __name__ == "__main__":
    with one_sentence("run_experiments.sh"):
        sys.exit(main(sys.argv[1:]))
