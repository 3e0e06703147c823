"""TinyImageNet (Stanford CS231n, from ImageNet), from the original zip or one with fewer training images per class."""

import statistics
from pathlib import Path

import numpy as np

from dataloaders import image_sets
from dataloaders.archives import ArchiveError, Zip
from dataloaders.download import download
from dataloaders.image_sets import Files, ImageSet
from utils import atomic
from utils.errors import UserError

NAME, SIDE, CLASSES, TEST_COUNT = "tinyimagenet", 64, 200, 50
ROOT, COMPLETE = "tiny-imagenet-200", 500
ARCHIVE = f"{ROOT}.zip"
HOMES = ("http://cs231n.stanford.edu/",)
LARGEST = 300_000_000

GET_IT = f"get it with: uv run get_data.py {NAME} (without internet: --source FOLDER that holds {ARCHIVE})"


def load(data_path) -> tuple[ImageSet, Files]:
    """The set, as get_data.py put it there. UserError if it is missing or damaged.

    La-MAML's command lines name the folder that the archive unpacks to: then it is looked for beside that, too.
    """
    folder = Path(data_path)
    if folder.name == ROOT and not (folder / NAME).exists():
        folder = folder.parent
    return image_sets.read(folder / NAME, GET_IT)


def is_present(data_path) -> bool:
    """Whether it is there and undamaged."""
    return image_sets.is_sound(Path(data_path) / NAME)


def fetch(data_path, source=None) -> str:
    """Puts it into data_path, from the folder `source` or the internet, whole or not at all. Returns what it was."""
    folder = Path(data_path) / NAME
    try:
        if source is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic.scratch_file(folder.parent, ARCHIVE) as archive:
                archive.write_bytes(download(ARCHIVE, HOMES, LARGEST, lambda content: None))
                classes, arrays = _from_zip(archive, expected=COMPLETE)
            origin = ARCHIVE
        else:
            archive = _archive_in(Path(source))
            classes, arrays = _from_zip(archive)
            origin = archive.name
        image_sets.write(folder, classes, arrays)
        return f"{origin}, {len(arrays['train'][1]) // CLASSES} training images of each class"
    except ArchiveError as error:
        raise UserError(f"{source or ARCHIVE} cannot be imported ({error}): bring a sound copy.") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}): make room, or give another --data_path.") from None


def _archive_in(source: Path) -> Path:
    for folder in (source, source / NAME, source / "tiny-imagenet"):
        for path in (folder / ARCHIVE, *sorted(folder.glob(f"{ROOT}*.zip"))):
            if path.is_file():
                return path
    raise UserError(f"--source {source} has no {ARCHIVE}: give the folder that holds it.")


def _from_zip(path: Path, expected: int = 0):
    """The classes (by their WordNet names), and split -> images and labels; the validation images are the test part.

    expected: training images of each class; 0: any number, the same for all.
    """
    with Zip(path) as archive:
        wnids = sorted(set(_text(archive, f"{ROOT}/wnids.txt").split()))
        if len(wnids) != CLASSES:
            raise ArchiveError(f"its wnids.txt names {len(wnids)} classes, expected {CLASSES}")
        train: dict[str, list[str]] = {wnid: [] for wnid in wnids}
        for name in archive.names():
            parts = name.split("/")
            if len(parts) == 5 and parts[:2] == [ROOT, "train"] and name.endswith(".JPEG"):
                if parts[2] not in train:
                    raise ArchiveError(f"its train folder has class {parts[2][:20]!r}, which wnids.txt has not")
                train[parts[2]].append(name)
        counts = {wnid: len(names) for wnid, names in train.items()}
        count = expected or statistics.mode(counts.values())
        if not any(counts.values()):
            raise ArchiveError(f"it has no training images {ROOT}/train/<class>/images/*.JPEG")
        if odd := [wnid for wnid, found in counts.items() if found != count]:
            raise ArchiveError(
                f"class {odd[0]} has {counts[odd[0]]} training images, {'expected' if expected else 'others'} {count}"
            )
        test: dict[str, list[str]] = {wnid: [] for wnid in wnids}
        for line in _text(archive, f"{ROOT}/val/val_annotations.txt").splitlines():
            file, _, rest = line.partition("\t")
            wnid = rest.split("\t")[0]
            if wnid not in test:
                raise ArchiveError(f"its val_annotations.txt names class {wnid[:20]!r}, which wnids.txt has not")
            if (name := f"{ROOT}/val/images/{file}") in test[wnid]:
                raise ArchiveError(f"its val_annotations.txt names {file[:40]} twice")
            test[wnid].append(name)
        if odd := [wnid for wnid, names in test.items() if len(names) != TEST_COUNT]:
            raise ArchiveError(f"class {odd[0]} has {len(test[odd[0]])} validation images, expected {TEST_COUNT}")
        arrays = {split: _arrays(archive, part) for split, part in (("train", train), ("test", test))}
    return wnids, arrays


def _text(archive: Zip, name: str) -> str:
    return archive.read(name).decode(errors="replace")


def _arrays(archive: Zip, part: dict[str, list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, by class and within one by the numbers of the images."""
    names = [name for wnid in part for name in sorted(part[wnid], key=_number)]
    images = np.empty((len(names), 3, SIDE, SIDE), np.uint8)
    for i, name in enumerate(names):
        images[i] = archive.image(name, SIDE)
    return images, np.repeat(np.arange(len(part)), len(names) // len(part))


def _number(name: str) -> tuple[int, str]:
    digits = name.rpartition("_")[2].partition(".")[0]
    return (int(digits) if digits.isdecimal() else -1), name
