#!/usr/bin/env python3
"""Fetches or imports data sets, and verifies them: `python3 get_data.py mnist`."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

from dataloaders import mnist
from utils.errors import UserError, nearest


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    is_present: data_path -> whether it is there and sound. fetch: (data_path, source) -> None.
    """

    is_present: Callable
    fetch: Callable
    older_names: tuple[str, ...] = ()


#: MER's and La-MAML's get_data.py fetched three ready-made streams; here they are all built from the one MNIST.
SOURCES = {
    "mnist": Source(mnist.is_present, mnist.fetch, ("rotations", "permutations", "manypermutations")),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message[0].upper() + message[1:] + " (see --help).")


def main(argv: list[str] | None = None) -> None:
    """Puts the named data set into --data_path. Exits with code 2 and one sentence if that cannot be done."""
    older = ", ".join(name for source in SOURCES.values() for name in source.older_names)
    parser = _Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("name", help=f"{', '.join(SOURCES)} or all (older names for mnist: {older})")
    parser.add_argument("--source", help="a folder that holds the original files, instead of downloading them")
    parser.add_argument("--data_path", default="data", help="where to put them (default data)")
    try:
        args = parser.parse_args(argv)
        for name in _names(args.name):
            if SOURCES[name].is_present(args.data_path):
                print(f"{name} is in {args.data_path}/{name} already, and sound.")
                continue
            SOURCES[name].fetch(args.data_path, args.source)
            print(f"{name} is now in {args.data_path}/{name}.")
    except UserError as error:
        print(f"get_data.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _names(asked: str) -> list[str]:
    if asked == "all":
        return list(SOURCES)
    for name, source in SOURCES.items():
        if asked in (name, *source.older_names):
            return [name]
    raise UserError(f"{asked} is not a data set that can be fetched: {nearest(asked, [*SOURCES, 'all'])}.")


if __name__ == "__main__":
    main()
