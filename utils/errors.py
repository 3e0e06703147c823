"""The one exception that a user is meant to read."""

import difflib


class UserError(Exception):
    """Something the user gave cannot work: the message is one sentence with the value, what was expected and the fix.

    Scripts print it without a traceback and exit with `exit_code`.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, valid) -> str:
    """The sentence part that names what was probably meant, or else everything valid if that is not too much."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}"
    return f"choose one of {', '.join(valid)}" if len(valid) <= 30 else "nothing known is spelt like it"
