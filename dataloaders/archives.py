"""Reading archives that somebody else made: nothing is unpacked to the disk, and nothing in them is believed."""

import io
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

#: No image or list of these data sets is larger, in bytes.
LARGEST_MEMBER = 5_000_000


class ArchiveError(ValueError):
    """What is wrong with an archive, in a few words."""


class Zip:
    """The members of a zip file by name; ArchiveError for whatever is not as it should be."""

    def __init__(self, path: Path):
        try:
            self._file = zipfile.ZipFile(path)
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise ArchiveError(f"it is no readable zip file: {error}") from None
        for entry in self._file.infolist():
            name = PurePosixPath(entry.filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts or ":" in entry.filename:
                raise ArchiveError(f"its member {entry.filename!r} would lie outside the folder")
            if entry.file_size > LARGEST_MEMBER:
                raise ArchiveError(f"its member {entry.filename} would unpack to {entry.file_size:,} bytes")

    def __enter__(self) -> "Zip":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def names(self) -> list[str]:
        """Of all files, in no particular order."""
        return [entry.filename for entry in self._file.infolist() if not entry.is_dir()]

    def read(self, name: str) -> bytes:
        """A member's content; its checksum is verified."""
        try:
            return self._file.read(name)
        except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ArchiveError(f"its member {name} is damaged, encrypted or missing: {error}") from None

    def image(self, name: str, side: int) -> np.ndarray:
        """[3, side, side] uint8; greyscale images become RGB."""
        return np.asarray(self.picture(name, side, "RGB")).transpose(2, 0, 1)

    def picture(self, name: str, side: int, mode: str) -> Image.Image:
        """The image of this name, of side x side pixels, in one of Pillow's modes."""
        try:
            with Image.open(io.BytesIO(self.read(name))) as image:
                if image.size != (side, side):
                    raise ArchiveError(f"{name} is {image.size[0]} x {image.size[1]} pixels, expected {side} x {side}")
                return image.convert(mode)
        except ArchiveError:
            raise
        except UnidentifiedImageError:
            raise ArchiveError(f"{name} is no readable image") from None
        except Exception as error:  # Pillow raises nearly anything for a damaged image
            raise ArchiveError(f"{name} is no readable image: {error}") from None
