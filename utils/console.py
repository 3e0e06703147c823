"""Writing to a terminal or a log that may be closed or full: the run goes on."""

import contextlib
import os


class Tolerant:
    """A stream that drops what it cannot write. stream: None where the process was started without one."""

    encoding = "utf-8"

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        if self.stream is not None:
            try:
                self.stream.write(text)
            except (OSError, ValueError):
                self._give_up()
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            try:
                self.stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def isatty(self) -> bool:
        return self.stream is not None and not self.stream.closed and self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def _give_up(self) -> None:
        """What is left in its buffer goes nowhere, or the interpreter would fail on it when it ends."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        self.stream = None


def say(text: str, stream) -> None:
    """Prints a line, if that is possible."""
    tolerant = Tolerant(stream)
    tolerant.write(text + "\n")
    tolerant.flush()
