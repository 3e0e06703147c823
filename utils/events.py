"""TensorBoard events of one seed, in one file that only grows."""

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from utils import atomic

NAME = "events.out.tfevents"


class EventFile:
    """Scalars by tag and step.

    torch's SummaryWriter starts a new file at every start and writes from a thread of its own; this one goes on in the
    same file from where a checkpoint was taken, so nothing is there twice, and a full disk is an OSError here and now.

    Args:
        folder: where. size: bytes to keep of a file that is there already; what follows them is dropped.

    incomplete: whether there were fewer.
    """

    def __init__(self, folder: Path, size: int = 0):
        self.path = folder / NAME
        self._file = self.path.open("ab")
        there = self.path.stat().st_size
        self.incomplete = there < size
        self._file.truncate(min(size, there))
        self._records = RecordWriter(self._file)
        if not self.path.stat().st_size:
            self._add(file_version="brain.Event:2")

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._add(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=float(value))]))

    def _add(self, **content) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())

    def flush(self) -> None:
        """Lets readers see everything."""
        self._file.flush()

    def sync(self) -> int:
        """Waits until everything is on the disk; returns the size of the file in bytes."""
        self.flush()
        atomic.sync(self.path)
        return self.path.stat().st_size

    def close(self) -> None:
        self._file.close()
