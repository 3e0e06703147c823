#!/usr/bin/env python3
"""One published experiment as a user runs it: wall seconds, peak memory, bytes of data on disk.

    uv run python -m benchmarks.whole_run [--out benchmarks/results/whole_run.json] [options for main.py ...]

Runs `main.py --model lamaml --dataset mnist_rotations` for five seeds in a process of its own (further options are
passed on) and compares with what the 2020 code needed for one seed on one core of such a machine: 200 to 229 s and
2.56 GB with evaluations included, measured by this project's founders on the same stream.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PUBLISHED_SECONDS_PER_SEED = 200.0
PUBLISHED_BYTES = 2.56e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args, extra = parser.parse_known_args()
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
    text = json.dumps(found, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
