"""The folder of one run: made once, used by one process at a time, found again to go on.

<log_dir>/<model>/<expt_name>-<time>/
    checkpoints/    until the run is finished: the last two checkpoints, and the lock
    <seed>/training_parameters.json
and what utils/record.py writes.
"""

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import socket
from pathlib import Path

from utils import atomic, parameters
from utils.config import MAY_CHANGE, Config
from utils.errors import UserError

SUMMARY = "summary.json"

#: Statuses of runs that have nothing left to do.
FINISHED = ("completed", "diverged")


class RunFolder:
    """A folder that this process has for itself, until `close`.

    path: the folder. parameters: what its training_parameters.json say, but for the seed. reopened: made by an earlier
    process.
    """

    def __init__(self, path: Path, told: dict, lock: int, reopened: bool):
        self.path, self.parameters, self._lock, self.reopened = path, told, lock, reopened

    @classmethod
    def create(cls, config: Config, data_sha256: str) -> "RunFolder":
        """A folder that did not exist before. UserError if it cannot be written."""
        told, path, lock = _described(config, data_sha256), None, None
        try:
            path = _new_folder(config)
            (path / "checkpoints").mkdir()
            lock = _lock(path)
            folder = cls(path, told, lock, reopened=False)
            folder._write_parameters(config.seeds)
        except OSError as error:
            if lock is not None:
                os.close(lock)
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
            raise UserError(
                f"--log_dir {config.run.log_dir} cannot be written ({error}): give a writable folder with room in it."
            ) from None
        return folder

    @classmethod
    def reopen(cls, path: Path, config: Config) -> "RunFolder":
        """The folder of an earlier run with this configuration, to go on with.

        UserError if it is finished (with the exit code that it ended with), in use, or cannot be written.
        """
        _refuse_finished(path)
        try:
            (path / "checkpoints").mkdir(exist_ok=True)
            lock = _lock(path)
        except OSError as error:
            raise UserError(f"--resume {path} cannot be written ({error}): make it writable.") from None
        folder = cls(path, {}, lock, reopened=True)
        try:
            folder.parameters = parameters.read(path)[1]
            _refuse_finished(path)  # it may have ended just now
            atomic.remove_partial(path)
            folder._write_parameters(config.seeds)
        except OSError as error:
            folder.close()
            raise UserError(f"--resume {path} cannot be written ({error}): make room, or make it writable.") from None
        except BaseException:
            folder.close()
            raise
        return folder

    def _write_parameters(self, seeds) -> None:
        """For the seeds that have none yet."""
        for seed in seeds:
            self.seed_folder(seed).mkdir(exist_ok=True)
            path = self.seed_folder(seed) / parameters.NAME
            if not path.exists():
                atomic.write_text(path, json.dumps({**self.parameters, "seed": seed}, indent=2) + "\n")

    def seed_folder(self, seed: int) -> Path:
        return self.path / str(seed)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def remove_checkpoints(self) -> None:
        """For a run that is finished."""
        _remove_checkpoints(self.path)

    def close(self) -> None:
        """Other processes may have it now."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def finished_as(path: Path) -> str | None:
    """The status of a run that has nothing left to do; None if it has."""
    status = summary_of(path).get("status")
    return status if status in FINISHED else None


def summary_of(path: Path) -> dict:
    """What the summary.json of a run says; nothing if it has none that can be read."""
    try:
        content = json.loads((path / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refuse_finished(path: Path) -> None:
    if (status := finished_as(path)) is not None:
        _remove_checkpoints(path)
        code = 3 if status == "diverged" else 0
        raise UserError(f"the run in {path} is finished ({status}): nothing is left to do.", exit_code=code)


def _remove_checkpoints(path: Path) -> None:
    shutil.rmtree(path / "checkpoints", ignore_errors=True)


def runs(config: Config) -> list[Path]:
    """The folders of the runs of the algorithm in --log_dir, newest first within each name; none if it has none."""
    try:
        return sorted((Path(config.run.log_dir) / config.algorithm.name).glob("*"), reverse=True)
    except OSError:
        return []


def matching(config: Config) -> Path | None:
    """The folder of an earlier run of this very configuration: a finished one, or else the newest; None if none is.

    What may change when a run goes on (MAY_CHANGE: where files lie, how long it may run) need not match.
    """
    wanted, found = _described(config), []
    for path in runs(config):
        with contextlib.suppress(UserError):
            saved = parameters.read(path)[1]
            if _same({"pretrained_sha256": "", **saved, "options": config.with_defaults(saved["options"])}, wanted):
                found.append(path)
    return next((path for path in found if finished_as(path)), found[0] if found else None)


def _described(config: Config, data_sha256: str | None = None) -> dict:
    """As it is when it is read again: with lists for tuples, and no two values the same object."""
    return json.loads(json.dumps(parameters.describe(config, data_sha256)))


def lasting(options: dict) -> dict:
    """The options that stay when a run goes on."""
    return {name: value for name, value in options.items() if name not in MAY_CHANGE}


def _same(saved: dict, wanted: dict) -> bool:
    names = ("model", "dataset", "data", "seeds", "as_published", "pretrained_sha256")
    return all(saved[name] == wanted[name] for name in names) and lasting(saved["options"]) == lasting(
        wanted["options"]
    )


def _new_folder(config: Config) -> Path:
    """Making a folder fails if it is there: of two runs that start at the same instant, one takes the next instant."""
    parent = Path(config.run.log_dir) / config.algorithm.name
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        moment = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
        folder = parent / f"{config.run.expt_name}-{moment}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def _lock(path: Path) -> int:
    """Locks the folder for this process; the kernel lets go of it when the process ends, however that happens.

    Returns the descriptor that holds the lock. UserError if another process has it.
    """
    file = path / "checkpoints" / "lock"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        user = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise UserError(f"the run in {path} is in use by {user or 'another process'}: wait for its end.") from None
    except OSError:
        os.close(descriptor)
        raise
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor
