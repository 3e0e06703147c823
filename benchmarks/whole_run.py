#!/usr/bin/env python3
"""One published experiment as a user runs it: wall seconds, peak memory, bytes of data on disk.

    uv run python -m benchmarks.whole_run [--out benchmarks/results/whole_run.json] [options for main.py ...]

Runs `main.py --model lamaml --dataset mnist_rotations` for five seeds in a process of its own (further options are
passed on) and compares with what the 2020 code needed for one seed on one core of such a machine: 200 to 229 s and
2.56 GB with evaluations included, measured by this project's founders on the same stream.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import Options, options, write
from utils.command_line import one_sentence

ROOT = Path(__file__).parent.parent
PUBLISHED_SECONDS_PER_SEED = 200.0
PUBLISHED_BYTES = 2.56e9


def main():
    argv = sys.argv[1:]
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--out=") else [word])]
    at = argv.index("--out") if "--out" in argv else len(argv)
    own = argv[at : at + 2] or [word for word in argv if word in ("--help", "-h")]
    args, extra = options(Options, __doc__, own), argv[:at] + argv[at + 2 :]
    with tempfile.TemporaryDirectory() as logs:
        line = ["main.py", "--model", "lamaml", "--dataset", "mnist_rotations", *extra, "--log_dir", logs]
        started = time.perf_counter()
        subprocess.run([sys.executable, *line], cwd=ROOT, check=True)
        seconds = time.perf_counter() - started
        (summary,) = Path(logs).rglob("summary.json")
        content = json.loads(summary.read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    seeds = len(content["identity"]["seeds"])
    data = sum(path.stat().st_size for path in (ROOT / "data" / "mnist").iterdir())
    found = {
        "command": " ".join(line[:-2]),
        "cores": os.cpu_count(),
        "seeds": seeds,
        "retained_accuracy": content["metrics"]["retained_accuracy"],
        "seconds": round(seconds, 1),
        "seconds_per_seed": round(seconds / seeds, 1),
        "train_seconds": round(content["train_seconds"], 1),
        "evaluation_seconds": round(content["evaluation_seconds"], 1),
        "times_faster_per_seed": round(PUBLISHED_SECONDS_PER_SEED * seeds / seconds, 2),
        "peak_memory_bytes": peak,
        "times_less_memory": round(PUBLISHED_BYTES / peak, 2),
        "data_bytes_on_disk": data,
    }
    print(json.dumps(found, indent=2))
    write(args.out, found)


if __name__ == "__main__":
    with one_sentence("benchmarks.whole_run"):
        main()
