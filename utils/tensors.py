"""Files of tensors, written whole, and read without running any code that they may hold."""

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import torch

from utils import atomic


class _Sink:
    """A file that digests what goes through it, and tells of a full disk afterwards.

    torch.save can end the process when writing fails under it.
    """

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data) -> int:
        self.digest.update(data)
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def write(path, content) -> str:
    """Writes a file that `load` reads: tensors and plain values in dicts, lists and tuples. Returns its SHA-256.

    The same content gives the same bytes.
    """
    with Path(path).open("wb") as file:
        sink = _Sink(file)
        torch.save(content, sink)
        if sink.error:
            raise sink.error
    return sink.digest.hexdigest()


def save(path, content) -> None:
    """The same, whole or not at all."""
    with atomic.whole_file(path) as temporary:
        write(temporary, content)


def load(source: Path | bytes, **how):
    """What a file (or its bytes) holds; nothing in it is executed. how: see torch.load.

    ValueError, with the reason in a few words, for a file that is damaged, that holds more than tensors and plain
    values, or that would unpack to more than its own size.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed, which such a file never is")
                if damaged := archive.testzip():  # torch.load looks at no checksum
                    raise ValueError(f"it is damaged: the checksum of its part {damaged} differs")
        else:
            _refuse_other_files(file)
        if isinstance(file, io.BytesIO):
            file.seek(0)
        return torch.load(file, weights_only=True, **how)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error):
            raise ValueError("it asks for more than tensors and plain values: reading it could run code") from None
        raise ValueError("it is damaged") from None
    except (ValueError, MemoryError):
        raise
    except Exception:  # a damaged file can make PyTorch raise nearly anything
        raise ValueError("it is damaged") from None


def _refuse_other_files(file: Path | io.BytesIO) -> None:
    """ValueError for what is neither a zip file nor, as PyTorch wrote them before 2020, a sequence of pickles."""
    if isinstance(file, io.BytesIO):
        start = file.getvalue()[:2]
    else:
        with file.open("rb") as opened:
            start = opened.read(2)
    if start == b"PK":
        raise ValueError("it is damaged: its end is missing")
    if start != b"\x80\x02":
        raise ValueError("PyTorch did not write it")
