#!/usr/bin/env python3
"""One run: options -> stream -> learner -> loop -> record. `python3 main.py --help` lists everything."""

import sys

from utils.allocator import keep_freed_memory
from utils.command_line import one_sentence
from utils.config import configure
from utils.console import say
from utils.experiment import run
from utils.record import Result
from utils.report import report


def main(argv: list[str] | None = None) -> Result:
    """Runs what the command line asks for and returns its result.

    Raises SystemExit: 0 after --help, --list or --show_config, and if there is nothing left to --resume; 2 for what
    cannot work, with one sentence on stderr; 130 or 143 if stopped before the first evaluation (after it, the result
    says so).
    """
    with one_sentence("main.py"):
        config = configure(sys.argv[1:] if argv is None else argv)
        for note in config.notes:
            say(f"note: {note}", sys.stderr)
        result = run(config)
    say(report(config, result), sys.stdout)
    return result


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main().exit_code)
