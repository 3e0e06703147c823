"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1,623 characters, 20 drawings each, at 28 x 28 and 84 x 84 pixels.

An image set's train part holds the 964 characters of the 30 background alphabets, its test part the 659 of the 20
evaluation alphabets; classes are named "Alphabet/characterNN" and sorted, drawings are in the order of the drawers, 01
to 20.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dataloaders import image_sets
from dataloaders.archives import ArchiveError, Zip
from dataloaders.download import download
from dataloaders.image_sets import Files, ImageSet
from utils.errors import UserError

NAME, SIDE, DRAWINGS = "omniglot", 105, 20
ARCHIVES = {"train": "images_background.zip", "test": "images_evaluation.zip"}
CHARACTERS = {"train": 964, "test": 659}
HOMES = ("https://github.com/brendenlake/omniglot/raw/master/python/",)
LARGEST = 50_000_000

#: Pixels a side -> the folder and the filter; ANML's and OML's.
SIZES = {28: ("omniglot", Image.Resampling.LANCZOS), 84: ("omniglot84", Image.Resampling.BILINEAR)}

GET_IT = (
    f"get it with: uv run get_data.py {NAME} (without internet: --source FOLDER that holds"
    f" {' and '.join(ARCHIVES.values())})"
)


def load(data_path, side: int = 28) -> tuple[ImageSet, Files]:
    """The set at 28 or 84 pixels, as get_data.py put it there. UserError if it is missing or damaged."""
    return image_sets.read(Path(data_path) / SIZES[side][0], GET_IT)


def is_present(data_path) -> bool:
    """Whether it is there in both sizes, undamaged."""
    return all(image_sets.is_sound(Path(data_path) / folder) for folder, _ in SIZES.values())


def fetch(data_path, source=None) -> None:
    """Puts it into data_path, from the folder `source` or the internet, each size whole or not at all."""
    try:
        if source is None:
            with tempfile.TemporaryDirectory() as folder:
                for archive in ARCHIVES.values():
                    (Path(folder) / archive).write_bytes(download(archive, HOMES, LARGEST, lambda content: None))
                classes, drawings = _read(Path(folder))
        else:
            classes, drawings = _read(_folder_in(Path(source)))
    except ArchiveError as error:
        raise UserError(f"{source or NAME} cannot be imported ({error}): bring a sound copy.") from None
    labels, first = {}, 0
    for split, images in drawings.items():
        labels[split] = first + np.arange(len(images)) // DRAWINGS
        first += len(images) // DRAWINGS
    for side, (name, how) in SIZES.items():
        folder = Path(data_path) / name
        arrays = {split: (_resized(images, side, how), labels[split]) for split, images in drawings.items()}
        try:
            image_sets.write(folder, classes, arrays)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error}): make room, or give another --data_path.") from None


def _folder_in(source: Path) -> Path:
    for folder in (source, source / NAME):
        if all((folder / archive).is_file() for archive in ARCHIVES.values()):
            return folder
    raise UserError(f"--source {source} lacks {' or '.join(ARCHIVES.values())}: give the folder that holds both.")


def _read(folder: Path) -> tuple[list[str], dict[str, list[Image.Image]]]:
    """The classes, those of both parts, and the drawings of each part."""
    classes, drawings = [], {}
    for split, name in ARCHIVES.items():
        root = name.removesuffix(".zip")
        try:
            with Zip(folder / name) as archive:
                places: dict[str, dict[str, str]] = {}
                for member in archive.names():
                    parts = member.split("/")
                    if len(parts) == 4 and parts[0] == root and member.endswith(".png"):
                        drawer = parts[3].removesuffix(".png").rpartition("_")[2]
                        if places.setdefault(f"{parts[1]}/{parts[2]}", {}).setdefault(drawer, member) != member:
                            raise ArchiveError(f"{parts[1]}/{parts[2]} has two drawings {drawer}")
                if len(places) != CHARACTERS[split]:
                    raise ArchiveError(f"it has {len(places)} characters, expected {CHARACTERS[split]}")
                expected = [f"{drawer:02d}" for drawer in range(1, DRAWINGS + 1)]
                for character, found in places.items():
                    if sorted(found) != expected:
                        raise ArchiveError(f"{character} has {len(found)} drawings, expected 01 to {DRAWINGS}")
                ordered = sorted(places)
                drawings[split] = [
                    archive.picture(places[c][drawer], SIDE, "L") for c in ordered for drawer in expected
                ]
        except ArchiveError as error:
            raise ArchiveError(f"{name}: {error}") from None
        classes += ordered
    return classes, drawings


def _resized(images: list[Image.Image], side: int, how: Image.Resampling) -> np.ndarray:
    """[n, 1, side, side] uint8."""
    return np.stack([np.asarray(image.resize((side, side), how)) for image in images])[:, None]
