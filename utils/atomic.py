"""Files appear whole or not at all, also when the machine stops in between."""

import contextlib
import os
import tempfile
from pathlib import Path

#: How the names of files begin that are not whole yet.
PARTIAL = ".partial-"


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path beside `path`; what was written there becomes `path` when the block ends well."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL, suffix=f"-{path.name}")
    os.close(handle)
    try:
        yield Path(temporary)
        put(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def scratch_file(folder, name: str):
    """Yields the path of an empty file in a folder; what is still there when the block ends is removed."""
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=PARTIAL, suffix=f"-{name}")
    os.close(handle)
    try:
        yield Path(temporary)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def put(temporary, path) -> None:
    """Gives a file that is written its name, in the same folder, once it is on the disk."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    sync(temporary)
    os.replace(temporary, path)
    sync(Path(path).parent)


def sync(path) -> None:
    """Waits until what was written to a file, or the names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path, data) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path, text: str) -> None:
    write_bytes(path, text.encode())


def remove_partial(folder) -> None:
    """Removes what a process that was killed left unfinished anywhere in a folder of its own."""
    for path in Path(folder).rglob(f"{PARTIAL}*"):
        path.unlink(missing_ok=True)
