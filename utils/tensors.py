"""Files of tensors, written whole, and read without running any code that they may hold."""

import io
import pickle
import zipfile
from pathlib import Path

import torch

from utils import atomic


def dumped(content) -> memoryview:
    """The bytes of a file that holds `content`: tensors and plain values in dicts, lists and tuples.

    The same content gives the same bytes.
    """
    buffer = io.BytesIO()  # torch.save straight to a full disk can end the process instead of raising
    torch.save(content, buffer)
    return buffer.getbuffer()


def save(path, content) -> None:
    """Writes a file that `load` reads."""
    atomic.write_bytes(path, dumped(content))


def load(path: Path, **how):
    """What the file holds; nothing in it is executed. how: see torch.load.

    ValueError, with the reason in a few words, for a file that is damaged, that holds more than tensors and plain
    values, or that would unpack to more than its own size.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed, which such a file never is")
        return torch.load(path, weights_only=True, **how)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error):
            raise ValueError("it asks for more than tensors and plain values: reading it could run code") from None
        raise ValueError("it is damaged") from None
    except (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"it is damaged: {reason}") from None
