#!/usr/bin/env python3
"""Does a run ever get lost, or a damaged file ever get believed? Kills runs, fills disks and damages files to find out.

    uv run python -m benchmarks.faults [--what kill disk checkpoints archives] [--cases 100] [--minutes 15] [--out FILE]

kill         A run is killed with SIGKILL at a random moment of its life, resumed with the same command and --resume
             auto, perhaps killed again (up to three times), and left to end. Its record is compared with that of the
             same run in one piece: every file byte for byte, but for seconds and peak memory, and for the times in
             TensorBoard's events. Only kills that hit a running process count. Algorithms take turns, streams and
             options are drawn.
disk         A run writes to a small tmpfs that is filled at a random moment; it must end with exit code 2 and one
             sentence. Room is made, it is resumed, and its record is compared as above. (A tenth of the cases; needs
             the right to mount a tmpfs, and says so where there is none.)
checkpoints  One or both checkpoints of a stopped run are truncated, or a bit of them is flipped. Resumed, the run must
             end with the record of the run in one piece, saying which checkpoint it did not use, or refuse in one
             sentence with exit code 2.
archives     The same with the files that data are read from (the digits, a published stream, MNIST where it is there):
             they must be refused, or give the very data of the sound file.

Every case has a number that decides all that is drawn in it, but for when exactly a signal arrives. --first N starts
with case N. Processes are forked from this one, so that the packages are loaded once. The time limit ends a kind early,
and it says how far it came. Exit code 1 if anything was lost, torn, or silently used.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.common import Options as Common
from benchmarks.common import options, write
from dataloaders import mnist, registry
from dataloaders.stream import TrainingSet
from main import main as run_main
from model.registry import ALGORITHMS
from utils.command_line import one_sentence
from utils.errors import UserError, nearest
from utils.options import option, options_of

ROOT = Path(__file__).parent.parent
KINDS = ("kill", "disk", "checkpoints", "archives")


@dataclasses.dataclass(frozen=True)
class Options(Common):
    what: tuple[str, ...] = option(KINDS, "kinds of faults, of kill, disk, checkpoints and archives")
    cases: int = option(100, "cases of each kind (disk: a tenth of it)", low=1, high=100_000)
    first: int = option(0, "number of the first case", low=0)
    minutes: float = option(15.0, "time limit of each kind", above=0, high=1e5)


class LostError(Exception):
    """What must never happen."""


# ---------------------------------------------------------------- runs in processes of their own


@dataclasses.dataclass
class Process:
    """main.py with these arguments, forked, in a working directory of its own; what it prints goes into files there."""

    line: list[str]
    folder: Path

    def __post_init__(self):
        self.began = time.monotonic()
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become_main()

    def _become_main(self):
        code = 1
        try:
            os.chdir(self.folder)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = ["main.py", *self.line]
            code = run_main().exit_code
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL then; whether it was still running."""
        time.sleep(max(0.0, self.began + seconds - time.monotonic()))
        os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Exit code, negative for a signal."""
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.seconds = time.monotonic() - self.began
        return self.code

    @property
    def said(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def refusal(self) -> str | None:
        """The one sentence that it refused with, if it did so as it should."""
        said = [line for line in self.said.splitlines() if line.startswith("main.py: ")]
        return said[0] if self.code == 2 and len(said) == 1 and "Traceback" not in self.said else None


def run_whole(line: list[str], folder: Path) -> Process:
    process = Process(line, folder)
    process.wait()
    return process


def record_of(folder: Path) -> Path:
    """The one record below a working directory."""
    found = [path.parent.parent for path in folder.glob("logs/*/*/*/training_parameters.json")]
    if len(set(found)) != 1:
        raise LostError(f"{len(set(found))} records in {folder}")
    return found[0]


def compare(whole: Path, other: Path) -> None:
    """LostError if the record that `other` holds is not that of `whole`."""
    if differ := records.differences(record_of(whole), record_of(other)):
        raise LostError(f"{', '.join(differ)} of {record_of(other)} differ")


def published_streams(folder: Path) -> Path:
    """A data folder with small files as MER published them, so that these streams run everywhere and quickly."""
    torch.manual_seed(0)
    for name in ("rotations", "permutations", "manypermutations"):
        prototypes = torch.rand(10, 784)

        def task(t, n, prototypes=prototypes):
            y = torch.arange(n) % 10
            return [t, (prototypes[y].roll(t, 1) + 0.1 * torch.rand(n, 784)).clamp(0, 1), y]

        torch.save(tuple([task(t, n) for t in range(4)] for n in (120, 50)), folder / f"mnist_{name}.pt")
    return folder


def drawn_line(rng: random.Random, name: str, data: Path) -> list[str]:
    """A small run of an algorithm, with a stream and options drawn."""
    streams = ["digits_rotations"] * 3 + ["mnist_rotations", "mnist_permutations", "mnist_manypermutations"]
    line = {
        "model": name,
        "dataset": rng.choice(streams),
        "data_path": data,
        "seeds": list(range(rng.choice([1, 2, 3]))),
        "n_tasks": rng.choice([2, 3, 4]),
        "samples_per_task": rng.choice([40, 60, 80]),
        "n_epochs": rng.choice([1, 2, 3]),
        "batch_size": rng.choice([1, 5, 10]),
        "n_hiddens": 16,
        "log_every": rng.choice([0, 0, 3]),
        "checkpoint_minutes": rng.choice([0, 0.0003, 0.003, 5]),
        "evaluate_tasks": rng.choice(["all", "seen", "new"]),
    }
    algorithm = ALGORITHMS[name]
    known = options_of(algorithm.options)
    if "n_memories" in known:
        line["n_memories"] = 20
    for option_, chosen in (
        ("glances", [1, 2]),
        ("second_order", ["yes", "no"]),
        ("use_old_task_memory", ["yes", "no"]),
    ):
        if option_ in known:
            line[option_] = rng.choice(chosen)
    if algorithm.learner.replays:
        line["log_alignment"] = rng.choice(["yes", "no"])
    if algorithm.as_published:
        line["as_published"] = rng.choice(["yes", "no"])
    if rng.random() < 0.3:
        line |= {"validation": 0.2, "evaluate_on": "validation", "calc_test_accuracy": "yes"}
    return [str(part) for flag, v in line.items() for part in (f"--{flag}", *(v if isinstance(v, list) else [v]))]


# ---------------------------------------------------------------- the kinds of faults


def kill(case: int, folder: Path, data: Path) -> str:
    rng = random.Random(case)
    line = drawn_line(rng, list(ALGORITHMS)[case % len(ALGORITHMS)], data)
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir(), killed.mkdir()
    reference = run_whole(line, whole)
    if reference.code:
        raise LostError(f"exit code {reference.code} in one piece: {' '.join(line)}\n{reference.said}")
    kills = 0
    while kills == 0:
        shutil.rmtree(killed), killed.mkdir()
        for _ in range(rng.choice([1, 1, 2, 3])):
            # Half of a small run's life is drawing plots: most kills are to hit what comes before.
            moment = rng.uniform(0, reference.seconds if rng.random() < 0.3 else 0.6 * reference.seconds)
            if not Process([*line, "--resume", "auto"], killed).kill_after(moment):
                break
            kills += 1
    end = run_whole([*line, "--resume", "auto"], killed)
    if end.code:
        raise LostError(f"exit code {end.code} when resumed: {' '.join(line)}\n{end.said}")
    compare(whole, killed)
    how = "from a checkpoint" if "from step" in end.said else "from the start"
    how = "it was finished" if "is finished" in end.said else how
    return f"{how}, after {'one kill' if kills == 1 else 'several kills'}"


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    """A tmpfs mounted there."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        raise UserError(f"no tmpfs can be mounted here ({mounted.stderr.strip()}): give --what without disk.")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disk(case: int, folder: Path, data: Path) -> str:
    rng = random.Random(case)
    names = [name for name, a in ALGORITHMS.items() if not a.joint]
    line = [*drawn_line(rng, names[case % len(names)], data), "--checkpoint_minutes", "0"]
    whole, full = folder / "whole", folder / "full"
    whole.mkdir(), full.mkdir()
    reference = run_whole(line, whole)
    with small_disk(full, 12):
        process = Process(line, full)
        time.sleep(rng.uniform(0, 0.7 * reference.seconds))
        with contextlib.suppress(OSError), open(full / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096 if rng.random() < 0.99 else 1))
        process.wait()
        if process.code == 0:
            compare(whole, full)
            return "ended before it was full"
        if not process.refusal or ("--resume" not in process.refusal and "--log_dir" not in process.refusal):
            raise LostError(f"exit code {process.code} on a full disk: {' '.join(line)}\n{process.said}")
        (full / "filler").unlink()
        end = run_whole([*line, "--resume", "auto"], full)
        if end.code:
            raise LostError(f"exit code {end.code} when resumed: {' '.join(line)}\n{end.said}")
        compare(whole, full)
    return "refused, then resumed"


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Cut short, or with one bit flipped."""
    at = rng.randrange(len(content))
    if rng.random() < 0.4:
        return content[:at]
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


class Checkpoints:
    """The kind "checkpoints": a few runs are stopped once, and damaged again and again."""

    def __init__(self, folder: Path, data: Path):
        self.stopped = []
        for i, name in enumerate(["lamaml", "mer", "gem", "icarl", "meta_bgd", "ewc"]):
            line = [*drawn_line(random.Random(i), name, data), "--checkpoint_minutes", "0", "--seeds", "0", "1"]
            whole, stopped = folder / f"{name}-whole", folder / f"{name}-stopped"
            whole.mkdir(), stopped.mkdir()
            reference = run_whole(line, whole)
            while True:
                shutil.rmtree(stopped), stopped.mkdir()
                was_running = Process(line, stopped).kill_after(random.Random(i).uniform(0.3, 0.8) * reference.seconds)
                if was_running and len(list(stopped.glob("logs/*/*/checkpoints/*.pt"))) == 2:
                    break
            self.stopped.append((line, whole, stopped))

    def __call__(self, case: int, folder: Path, data: Path) -> str:
        rng = random.Random(case)
        line, whole, stopped = self.stopped[case % len(self.stopped)]
        copy = folder / "copy"
        shutil.copytree(stopped, copy)
        newest, older = sorted(copy.glob("logs/*/*/checkpoints/*.pt"), reverse=True)
        both = rng.random() < 0.3
        for path in (newest, older) if both else (newest,):
            path.write_bytes(damaged(rng, path.read_bytes()))
        end = run_whole([*line, "--resume", "auto"], copy)
        if both:
            if not end.refusal or "no checkpoint that can be used" not in end.refusal:
                raise LostError(f"both checkpoints damaged, exit code {end.code}: {end.said}")
            return "refused"
        if end.code or str(newest.relative_to(copy)) not in end.said:
            raise LostError(f"newest checkpoint damaged, exit code {end.code}: {end.said}")
        compare(whole, copy)
        return "recovered from the previous one"


class Archives:
    """The kind "archives"."""

    def __init__(self, folder: Path, data: Path):
        self.files = {
            "digits_rotations": [registry.DIGITS],
            "mnist_rotations": [data / "mnist_rotations.pt"],
            "mnist_permutations": [ROOT / "data" / "mnist" / f"{name}.gz" for name in mnist.FILES],
        }
        if not all(path.exists() for path in self.files["mnist_permutations"]):
            print("MNIST is not here: its archives are not among those damaged")
            del self.files["mnist_permutations"]
        self.sound = {name: self._read(name, paths[0].parent) for name, paths in self.files.items()}

    @staticmethod
    def _read(name: str, folder: Path) -> list:
        dataset = registry.DATASETS[name]
        data_path = folder.parent if folder.name == "mnist" else folder
        stream = registry.build_stream(dataset, dataset.options(n_tasks=2, samples_per_task=20), data_path)
        drawn = TrainingSet(stream, 0, [0], [0], 10)
        tests = [part for t in range(2) for pair in stream.evaluation(t, "test") for part in pair]
        return [drawn.x.clone(), drawn.y.clone(), *(part.clone() for part in tests)]

    def __call__(self, case: int, folder: Path, data: Path) -> str:
        rng = random.Random(case)
        name = list(self.files)[case % len(self.files)]
        copies = folder / ("mnist" if name == "mnist_permutations" else "copy")
        copies.mkdir()
        for path in self.files[name]:
            shutil.copy(path, copies)
        victim = copies / rng.choice(self.files[name]).name
        victim.write_bytes(damaged(rng, victim.read_bytes()))
        original = registry.DIGITS
        try:
            registry.DIGITS = copies / original.name
            found = self._read(name, copies)
        except UserError:
            return "refused"
        finally:
            registry.DIGITS = original
        if not all(torch.equal(a, b) for a, b in zip(found, self.sound[name], strict=True)):
            raise LostError(f"{victim.name} damaged and used")
        return "no harm: the content is sound"


# ---------------------------------------------------------------- all of it


def try_all(kind: str, o: Options, data: Path, scratch: Path) -> dict:
    """Runs the cases of one kind and counts how they ended."""
    began, ends, lost = time.monotonic(), Counter(), []
    cases = -(-o.cases // 10) if kind == "disk" else o.cases
    preparation = scratch / f"{kind}-preparation"
    preparation.mkdir()
    attempt = {"kill": kill, "disk": disk}.get(kind) or {"checkpoints": Checkpoints, "archives": Archives}[kind](
        preparation, data
    )
    for case in range(o.first, o.first + cases):
        if time.monotonic() - began > 60 * o.minutes:
            break
        folder = scratch / f"{kind}-{case}"
        folder.mkdir()
        try:
            ends[attempt(case, folder, data)] += 1
        except LostError as error:
            lost.append(f"case {case}: {error}")
            print(f"{kind}: {lost[-1]}", flush=True)
        else:
            shutil.rmtree(folder)
    tried = sum(ends.values()) + len(lost)
    found = {"asked": cases, "tried": tried, "as_it_should_be": sum(ends.values()), "ends": dict(ends), "lost": lost}
    found["seconds"] = round(time.monotonic() - began, 1)
    print(
        f"{kind}: {found['as_it_should_be']} of {tried} as it should be ({cases} asked for), {json.dumps(dict(ends))}"
    )
    return found


def main() -> int:
    o = options(Options, __doc__)
    if unknown := [kind for kind in o.what if kind not in KINDS]:
        raise UserError(f"--what {unknown[0]} is not known: {nearest(unknown[0], KINDS)}.")
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    data = scratch / "data"
    data.mkdir()
    found = {kind: try_all(kind, o, published_streams(data), scratch) for kind in o.what}
    write(o.out, {"cases": o.cases, "first": o.first, "cores": os.cpu_count(), "torch": torch.__version__, **found})
    if any(kind["lost"] for kind in found.values()):
        print(f"what was lost is kept in {scratch}")
        return 1
    shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    with one_sentence("benchmarks.faults"):
        sys.exit(main())
