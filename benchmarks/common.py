"""What the benchmarks share: options, and the file of results."""

import dataclasses
import json
import platform
import statistics
import sys
import time
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
        torch.backends.cudnn.allow_tf32 = False  # as main.py
    return found


def machine(o: OnDevice) -> dict:
    """What the figures were measured on."""
    name = platform.machine() if o.device == "cpu" else torch.cuda.get_device_name(o.device)
    return {"device": o.device, "machine": name, "threads": o.threads, "torch": torch.__version__}


def matmul_gflops(device: str) -> float:
    """What the machine gives just now: 1e9 floating-point operations a second, in a product of 1024 x 1024 floats.

    Machines that are shared differ by half from hour to hour; figures that are not ratios need this beside them.
    """
    a = torch.randn(1024, 1024, device=device)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / statistics.median(seconds) / 1e9


def write(out: str, content: dict) -> None:
    """Writes the results, if a file was asked for."""
    if not out:
        return
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(out, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error}): give a file in a writable folder.") from None
