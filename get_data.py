#!/usr/bin/env python3
"""Fetches or imports data sets, and verifies them: `python3 get_data.py mnist`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from dataloaders import cifar100, mnist, omniglot, tinyimagenet
from utils.command_line import one_sentence, parse
from utils.errors import UserError, nearest
from utils.interruption import Interruption, Stopped
from utils.options import option, options_of


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    is_present: data_path -> whether it is there and sound. fetch: (data_path, source) -> what it was, or None.
    """

    is_present: Callable
    fetch: Callable
    older_names: tuple[str, ...] = ()


#: MER's and La-MAML's get_data.py fetched three ready-made streams; here they are all built from the one MNIST.
SOURCES = {
    "mnist": Source(mnist.is_present, mnist.fetch, ("rotations", "permutations", "manypermutations")),
    "cifar100": Source(cifar100.is_present, cifar100.fetch),
    "tinyimagenet": Source(tinyimagenet.is_present, tinyimagenet.fetch),
    "omniglot": Source(omniglot.is_present, omniglot.fetch),
}


@dataclass(frozen=True)
class Options:
    source: str = option("", "a folder that holds the original files, instead of downloading them")
    data_path: str = option("data", "where to put them")


def main(argv: list[str] | None = None) -> None:
    """Puts the named data set into --data_path. Exits with code 2 and one sentence if that cannot be done; with 130 or
    143, and nothing half done, if it is stopped.
    """
    older = ", ".join(name for source in SOURCES.values() for name in source.older_names)
    usage = f"usage: get_data.py NAME [options]\n\nNAME: {', '.join(SOURCES)} or all (older names for mnist: {older})"
    argv = list(sys.argv[1:] if argv is None else argv)
    with one_sentence("get_data.py"):
        taken = {f"--{name}" for name in options_of(Options)}
        names = [i for i, word in enumerate(argv) if not word.startswith("-") and (i == 0 or argv[i - 1] not in taken)]
        asked = argv.pop(names[0]) if names else None
        options = parse(Options, argv, "get_data.py", f"{__doc__}\n\n{usage}")
        if asked is None:
            raise UserError(f"the name of a data set is missing: give one of {', '.join(SOURCES)}, or all.")
        with Interruption() as interruption:
            try:
                _get(_names(asked), options)
            except Stopped:
                raise SystemExit(interruption.exit_code) from None


def _get(names: list[str], options: Options) -> None:
    for name in names:
        if SOURCES[name].is_present(options.data_path):
            print(f"{name} is in {options.data_path}/{name} already, and sound.")
            continue
        origin = SOURCES[name].fetch(options.data_path, options.source or None)
        print(f"{name} is now in {options.data_path}/{name}" + (f" ({origin})." if origin else "."))


def _names(asked: str) -> list[str]:
    if asked == "all":
        return list(SOURCES)
    for name, source in SOURCES.items():
        if asked in (name, *source.older_names):
            return [name]
    raise UserError(f"{asked} is not a data set that can be fetched: {nearest(asked, [*SOURCES, 'all'])}.")


if __name__ == "__main__":
    main()
