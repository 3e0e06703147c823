"""What the benchmarks share: options, and the file of results."""

import dataclasses
import json
import platform
import sys
from pathlib import Path

import torch

from utils import atomic
from utils.allocator import keep_freed_memory
from utils.command_line import check_device, parse
from utils.errors import UserError
from utils.options import option


@dataclasses.dataclass(frozen=True)
class Options:
    """What every benchmark takes."""

    out: str = option("", "file to write the results to, as JSON")


@dataclasses.dataclass(frozen=True)
class OnDevice(Options):
    """What benchmarks of single operations take."""

    device: str = option("cpu", "cpu, cuda, or cuda:N")
    threads: int = option(1, "CPU threads", low=1, high=1024)


def options(cls: type, about: str, argv: list[str] | None = None):
    """The options of a benchmark from its command line."""
    found = parse(cls, sys.argv[1:] if argv is None else argv, "this benchmark", about)
    if isinstance(found, OnDevice):
        check_device(found.device)
        keep_freed_memory()
        torch.set_num_threads(found.threads)
    return found


def machine(o: OnDevice) -> dict:
    """What the figures were measured on."""
    name = platform.machine() if o.device == "cpu" else torch.cuda.get_device_name(o.device)
    return {"device": o.device, "machine": name, "threads": o.threads, "torch": torch.__version__}


def write(out: str, content: dict) -> None:
    """Writes the results, if a file was asked for."""
    if not out:
        return
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(out, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error}): give a file in a writable folder.") from None
