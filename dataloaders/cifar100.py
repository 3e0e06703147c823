"""CIFAR-100 (Krizhevsky 2009), from the original archive or from a zip of its images, which give the same arrays."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np

from dataloaders import image_sets
from dataloaders.archives import ArchiveError, Zip
from dataloaders.download import download
from dataloaders.image_sets import Files, ImageSet
from utils.errors import UserError

NAME, SIDE = "cifar100", 32
COUNTS = {"train": 500, "test": 100}
ARCHIVE = "cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
HOMES = ("https://www.cs.toronto.edu/~kriz/",)
LARGEST = 200_000_000

#: SHA-256 of the training images in the order that `_in_order` gives them, their labels, and the same of the test part.
CONTENT_SHA256 = "4aefac237fd13a5b157396deb3836264b79e661395eafeac1b1e653210368603"

GET_IT = f"get it with: uv run get_data.py {NAME} (without internet: --source FOLDER with {ARCHIVE} or {NAME}.zip)"


def load(data_path) -> tuple[ImageSet, Files]:
    """The set, as get_data.py put it there. UserError if it is missing or damaged."""
    return image_sets.read(Path(data_path) / NAME, GET_IT)


def is_present(data_path) -> bool:
    """Whether it is there and undamaged."""
    return image_sets.is_sound(Path(data_path) / NAME)


def fetch(data_path, source=None) -> None:
    """Puts it into data_path, from the folder `source` or the internet, whole or not at all."""
    try:
        if source is None:
            classes, arrays = _from_tar(download(ARCHIVE, HOMES, LARGEST, _check))
        else:
            classes, arrays = _from_source(Path(source))
    except ArchiveError as error:
        raise UserError(f"{source or ARCHIVE} cannot be imported ({error}): bring a sound copy.") from None
    folder = Path(data_path) / NAME
    try:
        image_sets.write(folder, classes, arrays)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}): make room, or give another --data_path.") from None


def _from_source(source: Path):
    for folder in (source, source / NAME):
        if (folder / ARCHIVE).is_file():
            with (folder / ARCHIVE).open("rb") as file:
                packed = file.read(LARGEST)
            _check(packed)
            return _from_tar(packed)
        if (folder / f"{NAME}.zip").is_file():
            return _from_zip(folder / f"{NAME}.zip")
    raise UserError(f"--source {source} has neither {ARCHIVE} nor {NAME}.zip: give the folder that holds one of them.")


def _check(packed: bytes) -> None:
    if (found := hashlib.md5(packed).hexdigest()) != ARCHIVE_MD5:
        raise ArchiveError(f"not the original: MD5 {found}, expected {ARCHIVE_MD5}")


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and plain values only."""

    ALLOWED = (
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    )

    def find_class(self, module, name):
        module = module.replace("numpy.core", "numpy._core")  # as it was called before NumPy 2
        if (module, name) not in self.ALLOWED:
            raise ArchiveError(f"it asks for {module}.{name}: reading it could run code")
        return super().find_class(module, name)


def _from_tar(packed: bytes):
    """The classes, and split -> images and labels, from the original archive."""
    contents = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            for name in ("meta", *image_sets.SPLITS):
                file = archive.extractfile(f"cifar-100-python/{name}")
                contents[name] = _PlainUnpickler(io.BytesIO(file.read(LARGEST)), encoding="latin1").load()
        classes = list(contents["meta"]["fine_label_names"])
        return classes, {
            split: _in_order(
                contents[split]["data"].reshape(-1, 3, SIDE, SIDE), np.array(contents[split]["fine_labels"])
            )
            for split in image_sets.SPLITS
        }
    except ArchiveError:
        raise
    except Exception as error:
        raise ArchiveError(f"it is damaged: {type(error).__name__} {error}") from None


def _from_zip(path: Path):
    """The same from a zip of images cifar100/{train,test}/<class>/<name>."""
    with Zip(path) as archive:
        places: dict[str, dict[str, list[str]]] = {split: {} for split in image_sets.SPLITS}
        for name in archive.names():
            parts = name.split("/")
            if len(parts) == 4 and parts[0] == NAME and parts[1] in places:
                places[parts[1]].setdefault(parts[2], []).append(name)
        classes = sorted(places["train"])
        if len(classes) != 100:
            raise ArchiveError(f"its train part has {len(classes)} classes, expected 100")
        arrays = {}
        for split, count in COUNTS.items():
            if odd := sorted(set(classes) ^ set(places[split])):
                raise ArchiveError(f"class {odd[0]} is in one of its train and test parts only")
            for name, found in places[split].items():
                if len(found) != count:
                    raise ArchiveError(f"class {name} has {len(found)} {split} images, expected {count}")
            names = [name for c in classes for name in sorted(places[split][c])]
            images = np.stack([archive.image(name, SIDE) for name in names])
            arrays[split] = _in_order(images, np.repeat(np.arange(100), count))
    digest = hashlib.sha256()
    for part in (*arrays["train"], *arrays["test"]):
        digest.update(np.ascontiguousarray(part))
    if digest.hexdigest() != CONTENT_SHA256:
        raise ArchiveError(f"its images are not CIFAR-100's: SHA-256 {digest.hexdigest()[:12]}…")
    return classes, arrays


def _in_order(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By class and, within one, by the images' digests: the same for every archive."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    order = sorted(range(len(labels)), key=lambda i: (labels[i], digests[i]))
    return images[order], labels[order].astype(np.int64)
