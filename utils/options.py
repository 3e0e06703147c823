"""Typed options: one dataclass field is one flag, with one sentence of help and one range.

Algorithms and streams declare what they take as a frozen dataclass of `option(...)` fields; the command line, `--help`,
`--show_config` and the checks are all made from it.
"""

import dataclasses
import math
import typing

from utils.errors import UserError

#: Options become 32-bit numbers on the way.
FLOAT32_MAX = 3.4028e38

YES = {"yes", "true", "1", "on"}
NO = {"no", "false", "0", "off"}


def option(default, help: str, *, low=None, high=None, above=None, flags=()):
    """A dataclass field that is also a command-line flag.

    Args:
        default: value when neither the command line nor papers/ says otherwise.
        help: one sentence, shown by --help.
        low, high: inclusive bounds of a number; above: exclusive lower bound.
        flags: further spellings of the flag, such as those of older code.
    """
    bounds = {"low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata={"help": help, "flags": tuple(flags), **bounds})


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of an options dataclass, as the command line sees it."""

    name: str
    kind: typing.Any
    default: typing.Any
    help: str = ""
    flags: tuple = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None

    @property
    def choices(self) -> tuple | None:
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is typing.Literal else None

    @property
    def placeholder(self) -> str:
        """What stands for the value in --help."""
        if self.choices:
            return "|".join(self.choices)
        names = {
            bool: "[yes|no]",
            int: "INT",
            float: "FLOAT",
            str: "STR",
            tuple[str, ...]: "STR ...",
            tuple[int, ...]: "INT ...",
            tuple[float, ...]: "FLOAT ...",
        }
        return names[self.kind] + (" | none" if self._may_be_none else "")

    @property
    def _may_be_none(self) -> bool:
        return self.default == () and self.kind in (tuple[int, ...], tuple[float, ...])

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return " or ".join(self.choices)
        words = {bool: "yes or no", int: "a whole number", float: "a finite 32-bit number", str: "a text"}
        words = {**words, tuple[int, ...]: "whole numbers above 0", tuple[float, ...]: "numbers above 0"}.get(
            self.kind, "one or more names"
        )
        if self._may_be_none:
            words += ", or none"
        if self.low is not None and self.high is not None:
            return f"{words} of at least {self.low} and at most {self.high}"
        if self.low is not None:
            return f"{words} of at least {self.low}"
        if self.above is not None:
            return f"{words} above {self.above}" + (f" and at most {self.high}" if self.high is not None else "")
        return words

    def parse(self, value):
        """The typed, checked value of what a user wrote (a text, or a value from a TOML file); else UserError."""
        try:
            typed = self._convert(value)
        except (ValueError, TypeError, OverflowError):
            typed = None
        if typed is None or not self._in_range(typed):
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            raise UserError(
                f"--{self.name} {value} cannot be used: expected {self.expected} (default {shown(self.default)})."
            )
        return typed

    def _convert(self, value):
        if self.kind is bool:
            text = str(value).lower()
            return True if text in YES else False if text in NO else None
        if self.kind is int:
            number = float(value)
            return (
                int(value if isinstance(value, str) and value.lstrip("+-").isdigit() else number)
                if number.is_integer()
                else None
            )
        if self.kind is float:
            number = float(value)
            return number if math.isfinite(number) else None
        if self.kind in (tuple[int, ...], tuple[float, ...]):
            if self._may_be_none and list(value) == ["none"]:
                return ()
            numbers = tuple(map(typing.get_args(self.kind)[0], value))
            return numbers if all(0 < number < FLOAT32_MAX for number in numbers) else None
        if self.kind == tuple[str, ...]:
            return tuple(map(str, value))
        return str(value)

    def _in_range(self, value) -> bool:
        if self.choices:
            return value in self.choices
        if self.kind is float and abs(value) > FLOAT32_MAX:
            return False
        return not (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
        )


def shown(value) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value) or "none"


def options_of(cls) -> dict[str, Option]:
    """name -> Option, for a dataclass whose fields were made with `option`."""
    hints = typing.get_type_hints(cls)
    return {
        f.name: Option(name=f.name, kind=hints[f.name], default=f.default, **f.metadata)
        for f in dataclasses.fields(cls)
    }
