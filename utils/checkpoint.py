"""Checkpoints of a run: the last two, each whole, each with its digest in its name."""

import hashlib
from pathlib import Path

from utils import atomic, tensors
from utils.errors import UserError

#: Checkpoints that are kept: the newest, and one to go back to if it is damaged.
KEPT = 2

#: Hex digits of the SHA-256 of a checkpoint's content in its name.
DIGITS = 16

#: Raised when what a checkpoint holds changes; an older one is then refused.
FORMAT = 1


class Checkpoints:
    """The files <count>-<digest>.pt of a folder: how many actions of the loop are done, and the first 16 hex digits of
    the SHA-256 of the content.

    The digest tells damage; it is no signature. What a checkpoint may hold is limited by how it is read: tensors and
    plain values.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, count: int, content: dict) -> Path:
        """Writes a checkpoint and removes all but the last two. OSError if there is no room; the others then remain."""
        with atomic.scratch_file(self.folder, "checkpoint") as scratch:
            digest = tensors.write(scratch, {"format": FORMAT, **content})
            path = self.folder / f"{count:012d}-{digest[:DIGITS]}.pt"
            atomic.put(scratch, path)
        for older in [other for other in self.paths() if other != path][KEPT - 1 :]:
            older.unlink()
        return path

    def paths(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("[0-9]*-*.pt"), reverse=True)

    def load(self) -> tuple[dict | None, list[str]]:
        """The newest sound checkpoint, None if there are none at all; and a sentence for each newer one that is not.

        The latter are renamed to .damaged, so that they never count as one of those that are kept. UserError if none
        is sound.
        """
        problems, damaged = [], []
        for path in self.paths():
            try:
                content = _read(path)
            except (OSError, ValueError) as error:
                problems.append(f"checkpoint {path} is not used: {error}.")
                damaged.append(path)
                continue
            for other in damaged:
                other.rename(other.with_suffix(".damaged"))
            return content, problems
        if problems:
            raise UserError(
                f"{self.folder} has no checkpoint that can be used ({' '.join(problems)[:-1]}): start the run anew,"
                " without --resume."
            )
        return None, []


def _read(path: Path) -> dict:
    data = path.read_bytes()
    if path.stem.partition("-")[2] != hashlib.sha256(data).hexdigest()[:DIGITS]:
        raise ValueError("its content is not what was written (the digest differs)")
    content = tensors.load(data, map_location="cpu")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}, which this version reads")
    return content
