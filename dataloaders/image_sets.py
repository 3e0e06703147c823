"""Image sets on disk: uint8 arrays in a folder, written once, memory-mapped, their digests checked when opened.

<data_path>/<name>/
    train_images.npy, test_images.npy     uint8 [n, channels, height, width], by class
    train_labels.npy, test_labels.npy     int64 [n], the class's place in `classes`
    about.json                            the classes, and the SHA-256 of them and of each file
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils import atomic
from utils.errors import UserError

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """classes: names, in the order of the labels. images, labels: split -> array, see above. fingerprint: of all."""

    classes: list[str]
    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    fingerprint: str


class Files:
    """Files that are mapped into memory, and whether they still are what they were when they were opened."""

    def __init__(self, paths):
        self.states = {path: file_state(path) for path in paths}

    def refuse_changed(self) -> None:
        """UserError if one of them was written to, replaced or removed since."""
        for path, state in self.states.items():
            try:
                changed = file_state(path) != state
            except OSError:
                changed = True
            if changed:
                raise UserError(f"{path} was changed while it was in use: bring the former file back, then resume.")


def file_state(path) -> tuple[int, int, int]:
    """What changes when a file is replaced or written to."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def write(folder: Path, classes: list[str], arrays: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Puts a set into its folder, whole or not at all. arrays: split -> images, labels. OSError if there is no room."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent) as alone:
        _write(folder, classes, arrays)
        for leftover in folder.parent.glob(f"{atomic.PARTIAL}*-{folder.name}") if alone else ():
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: Path):
    """Within it no other process writes a set into the folder. Yields False where that cannot be had (some network
    file systems do not lock folders).
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)


def _write(folder: Path, classes: list[str], arrays: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=atomic.PARTIAL, suffix=f"-{folder.name}"))
    try:
        digests = {"classes": _text_digest(classes)}
        for split, (images, labels) in arrays.items():
            for kind, array in (("images", images), ("labels", labels)):
                path = partial / f"{split}_{kind}.npy"
                np.save(path, np.ascontiguousarray(array))
                atomic.sync(path)
                digests[path.name] = file_digest(path)
        atomic.write_text(partial / "about.json", json.dumps({"classes": classes, "sha256": digests}, indent=1) + "\n")
        os.chmod(partial, 0o755)
        if folder.exists():  # out of the way, whole, until the new one is there
            former = folder.with_name(f"{atomic.PARTIAL}former-{folder.name}")
            shutil.rmtree(former, ignore_errors=True)
            os.replace(folder, former)
        os.replace(partial, folder)
        atomic.sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read(folder: Path, get_it: str) -> tuple[ImageSet, Files]:
    """The set in a folder, memory-mapped. UserError, ending in `get_it`, if it is missing or damaged."""
    if not os.path.isfile(folder / "about.json"):
        raise UserError(f"--data_path {folder.parent} has no {folder.name} ({folder}/about.json is missing): {get_it}.")
    try:
        about = json.loads((folder / "about.json").read_text())
        classes, digests = about["classes"], about["sha256"]
        fingerprint = _text_digest(digests)
        if digests.pop("classes") != _text_digest(classes):
            raise ValueError("the digest of the classes differs")
        files = Files([folder / name for name in digests])
        arrays = {}
        for name, digest in digests.items():
            if file_digest(folder / name) != digest:
                raise ValueError(f"the digest of {name} differs")
            # "c": changes would stay in memory; PyTorch wants arrays that could be written
            arrays[name.removesuffix(".npy")] = torch.from_numpy(np.load(folder / name, mmap_mode="c"))
        images, labels = ({split: arrays[f"{split}_{kind}"] for split in SPLITS} for kind in ("images", "labels"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is damaged ({error}): {get_it}.") from None
    return ImageSet(classes, images, labels, fingerprint), files


def is_sound(folder: Path) -> bool:
    """Whether a set is there and undamaged."""
    try:
        read(folder, "")
    except UserError:
        return False
    return True


def _text_digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
