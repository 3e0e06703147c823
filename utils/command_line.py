"""What every script of this project does with its command line: one parser, one validator, one way to say no.

Options are fields of a dataclass (utils/options.py): each has a range or a set, and a value outside it is refused in
one sentence with exit code 2, before anything is read or written.
"""

import argparse
import contextlib
import re
import sys
import typing
from collections.abc import Iterable

import torch

from utils.console import say
from utils.errors import UserError, nearest
from utils.options import Option, options_of, shown


class Parser(argparse.ArgumentParser):
    """argparse that finds the flags, all as texts; refuses what is none."""

    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.add_argument("--help", "-h", action="store_true")

    def error(self, message):
        raise UserError(message[0].upper() + message[1:] + " (see --help).")

    def add_options(self, options: Iterable[Option], short: dict[str, str] | None = None) -> None:
        """short: name -> a further spelling with a single dash."""
        for o in options:
            nargs, const = (
                ("?", "yes") if o.kind is bool else ("+", None) if typing.get_origin(o.kind) is tuple else (None, None)
            )
            spellings = [f"--{flag}" for flag in (o.name, *o.flags)]
            spellings += [short[o.name]] if short and o.name in short else []
            self.add_argument(*spellings, dest=o.name, nargs=nargs, const=const)

    def read(self, argv: list[str], script: str) -> dict[str, str | list[str]]:
        """name -> text, for what the command line gives."""
        given, unknown = self.parse_known_args(argv)
        for name, value in vars(given).items():
            if value == []:  # argparse drops "--", also from --name=--
                raise UserError(f"--{name} is given without a value: write --{name} VALUE (see --help).")
        if unknown:
            if not unknown[0].startswith("--"):
                raise UserError(
                    f"{unknown[0]!r} is not a flag and follows none that takes it: write --name value (see --help)."
                )
            name = unknown[0].removeprefix("--").split("=")[0]
            valid = [flag.removeprefix("--") for flag in self._option_string_actions if flag.startswith("--")]
            raise UserError(f"--{name} is not a flag of {script}: {nearest(name, valid)} (see --help).")
        return vars(given)


def parse(options: type, argv: list[str], script: str, about: str):
    """An instance of the dataclass of options, filled from a command line; --help prints them, after `about`."""
    known = options_of(options)
    parser = Parser()
    parser.add_options(known.values())
    given = parser.read(argv, script)
    if given.pop("help", False):
        show("\n".join([about.strip(), "", "options:", *(flag_line(o, o.default) for o in known.values())]))
    return options(**{name: known[name].parse(value) for name, value in given.items()})


def flag_line(o: Option, default) -> str:
    """An option in --help."""
    spelling = " ".join(f"--{flag}" for flag in (o.name, *o.flags))
    return f"  {spelling} {o.placeholder}\n      {o.help} (default {shown(default)})"


def show(text: str) -> typing.NoReturn:
    """Prints and stops; a reader who closes the pipe early, such as head, is no error."""
    say(text, sys.stdout)
    raise SystemExit(0)


def check_device(device: str) -> None:
    """UserError unless this machine has it."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
        raise UserError(f"--device {device} is not known: give cpu, cuda or cuda:N.")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {device} is not there: this machine has {torch.cuda.device_count()}; give --device cpu."
        )


@contextlib.contextmanager
def one_sentence(script: str):
    """What a user did wrong within the block ends the process with one sentence on stderr, and its exit code."""
    try:
        yield
    except UserError as error:
        say(f"{script}: {error}", sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
