"""MNIST (LeCun, Cortes, Burges) from its four original IDX files, checked by digest every time they are read."""

import gzip
import hashlib
import io
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloaders.download import download
from utils import atomic
from utils.errors import UserError

#: name -> bytes and SHA-256 of the uncompressed file (the gzip wrappers differ from copy to copy).
FILES = {
    "train-images-idx3-ubyte": (47040016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (60008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (7840016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (10008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}

#: Where the files can be fetched; the first that answers is used.
HOMES = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

GET_IT = "get it with: uv run get_data.py mnist (without internet: --source FOLDER that holds the four files)"


def read_file(path: Path, name: str) -> bytes:
    """The content of FILES[name], read from `path`, gzipped or not; UserError if it is not the sound original."""
    try:
        with path.open("rb") as file:
            return unpack(file.read(FILES[name][0] + 1), name)  # a sound file is smaller packed than unpacked
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be used ({error}): replace it, or {GET_IT}.") from None


def unpack(packed: bytes, name: str) -> bytes:
    """The content of FILES[name], gzipped or not; ValueError if it is not the sound original."""
    size, digest = FILES[name]
    try:
        is_gzip = packed[:2] == b"\x1f\x8b"
        content = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(size + 1) if is_gzip else packed
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged: {error}") from None
    if (found := hashlib.sha256(content).hexdigest()) != digest:
        raise ValueError(f"not the original: SHA-256 {found[:12]}…, expected {digest[:12]}…")
    return content


def load(data_path) -> dict[str, tuple[Tensor, Tensor]]:
    """split -> images [n, 28, 28] uint8 and labels [n] uint8, in the original order."""
    folder = Path(data_path) / "mnist"
    missing = [name for name in FILES if not os.path.exists(folder / f"{name}.gz")]
    if missing:
        raise UserError(f"--data_path {data_path} has no MNIST ({folder}/{missing[0]}.gz is missing): {GET_IT}.")
    arrays = {}
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        images, labels = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        images = np.frombuffer(read_file(folder / f"{images}.gz", images), np.uint8, offset=16)
        labels = np.frombuffer(read_file(folder / f"{labels}.gz", labels), np.uint8, offset=8)
        arrays[split] = torch.from_numpy(images.reshape(-1, 28, 28).copy()), torch.from_numpy(labels.copy())
    return arrays


def is_present(data_path) -> bool:
    """Whether all four files are there and sound."""
    try:
        return all(read_file(Path(data_path) / "mnist" / f"{name}.gz", name) for name in FILES)
    except UserError:
        return False


def fetch(data_path, source=None) -> None:
    """Puts the four files into data_path/mnist, from the folder `source` or the internet; each whole or not at all."""
    folder = Path(data_path) / "mnist"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if source is None:
                _download(name, folder)
            else:
                _import(name, Path(source), folder)
    except OSError as error:
        raise UserError(
            f"MNIST cannot be written to {folder} ({error}): give a writable folder with --data_path."
        ) from None


def _import(name: str, source: Path, folder: Path) -> None:
    candidates = [
        place / file for place in (source, source / "mnist", source / "MNIST" / "raw") for file in (f"{name}.gz", name)
    ]
    found = next((path for path in candidates if os.path.isfile(path)), None)
    if found is None:
        raise UserError(
            f"--source {source} has no {name}.gz, nor has {source}/mnist: give the folder that holds MNIST's files."
        )
    content = read_file(found, name)
    packed = found.read_bytes() if found.suffix == ".gz" else gzip.compress(content, mtime=0)
    atomic.write_bytes(folder / f"{name}.gz", packed)


def _download(name: str, folder: Path) -> None:
    largest = FILES[name][0]  # a sound file is smaller packed than unpacked
    packed = download(f"{name}.gz", HOMES, largest, lambda content: unpack(content, name))
    atomic.write_bytes(folder / f"{name}.gz", packed)
