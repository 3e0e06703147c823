#!/usr/bin/env python3
"""One run: options -> stream -> learner -> loop -> record. `python3 main.py --help` lists everything."""

import sys

from utils.config import configure
from utils.errors import UserError
from utils.experiment import run
from utils.record import Result
from utils.report import report


def main(argv: list[str] | None = None) -> Result:
    """Runs what the command line asks for and returns its result.

    Raises SystemExit: 0 after --help, --list or --show_config; 2 for what cannot work, with one sentence on stderr;
    130 if interrupted before the first evaluation (after it, the result says so).
    """
    try:
        config = configure(sys.argv[1:] if argv is None else argv)
        for note in config.notes:
            print(f"note: {note}", file=sys.stderr)
        result = run(config)
    except UserError as error:
        print(f"main.py: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(report(config, result))
    return result


if __name__ == "__main__":
    sys.exit(main().exit_code)
