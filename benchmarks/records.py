"""Whether two records say the same: used by benchmarks/faults.py and by tests."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

#: What tells how long a run took, and how often it was stopped; all else of two runs alike must be the same.
COSTS = {"resumed_at_steps", "train_seconds", "evaluation_seconds", "peak_memory_bytes"}


def contents(folder: Path) -> dict:
    """Every file of a record by its path in it: bytes; of JSON what is no cost; of events tag, step and value."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path: Path):
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        content.pop("command", None)
        return {key: value for key, value in content.items() if key not in COSTS}
    if "tfevents" in path.name:
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        return {tag: [(e.step, str(e.value)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return path.read_bytes()


def differences(first: Path, second: Path) -> list[str]:
    """The files that differ between two records, or that one of them lacks."""
    one, other = contents(first), contents(second)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
