"""One run from its configuration to its record."""

import contextlib
import os
import re
import resource
import sys
import time

import numpy as np
import torch
import tqdm

from dataloaders.registry import build_stream
from model.learner import Learner
from model.networks import Heads, build_network
from utils import parameters, run_folder, saved_network
from utils.checkpoint import Checkpoints
from utils.config import Config
from utils.console import Tolerant, say
from utils.errors import UserError
from utils.interruption import Interruption, Stopped
from utils.loop import Evaluation, Loop
from utils.record import Outcome, Record, Result
from utils.run_folder import RunFolder

#: Of the time, what checkpoints at the ends of tasks may take, where tasks are short; those that take less than so many
#: seconds are always taken.
CHECKPOINT_SHARE, ALWAYS_WORTH = 0.05, 0.1

#: How PyTorch says that there is not enough memory.
TOO_LARGE = re.compile("out of memory|can't allocate|ALLOC_FAILED|calculation overflowed|multiplication overflow")


def run(config: Config) -> Result:
    """Trains, evaluates and records, or goes on with a run that was stopped.

    UserError for what cannot work. A run that is asked to stop ends in a record that says so, and in a checkpoint.
    """
    try:
        with Interruption(config.run.time_limit) as interruption, _settings(config), contextlib.ExitStack() as owned:
            return _Run(config, interruption, owned).run()
    except Stopped:
        raise UserError(
            "interrupted before there was anything to record: give the same command again.",
            exit_code=interruption.exit_code,
        ) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not TOO_LARGE.search(str(error)):
            raise
        raise UserError(
            f"this run needs more memory than --device {config.run.device} has: lower --memories or --n_memories,"
            " --n_hiddens, --batch_size or the number of --seeds; or make room there, and add --resume auto."
        ) from None


@contextlib.contextmanager
def _settings(config: Config):
    """PyTorch's global settings, while the run lasts."""
    threads, short = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(config.run.threads or os.cpu_count())
    torch.backends.cudnn.allow_tf32 = False  # on a GPU convolutions would round to 10 bits
    switch = config.run.deterministic and not torch.are_deterministic_algorithms_enabled()
    if switch:  # touched only if asked for: even switching it off makes PyTorch load its compiler, 5 s
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; see torch's notes
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if switch:
            torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = short


def build_learner(config: Config, stream) -> Learner:
    """The learner of a run, as it is before the first step."""
    heads = Heads(stream.n_classes, stream.classes_per_task, stream.scenario) if stream.classes_per_task else None
    network = build_network(config.network, stream.input_shape, stream.n_classes, heads)
    network = config.algorithm.network(network, stream.n_tasks, config.learner)
    learner = config.algorithm.learner(network, config.learner, config.seeds, device=torch.device(config.run.device))
    if config.run.log_alignment:
        learner.watch_alignment()
    return learner


class _Run:
    """What the parts of a run share. Whatever must be given back when it ends is put on `owned`."""

    def __init__(self, config: Config, interruption: Interruption, owned: contextlib.ExitStack):
        self.config, self.interruption, self.owned = config, interruption, owned
        self.device = torch.device(config.run.device)
        self.resumed_at_steps: tuple[int, ...] = ()
        self.peak_memory = 0
        self.notes: list[str] = []

    def run(self) -> Result:
        config = self.config
        folder = self._earlier_folder()
        checkpoint = self._checkpoint(folder) if folder else None
        stream = build_stream(config.dataset, config.stream, config.run.data_path).to(self.device)
        self.notes += stream.notes
        n = stream.n_tasks
        phases = [list(range(n))] if config.algorithm.joint else [[t] for t in range(n)]
        self.learned_at = np.array([phase for t in range(n) for phase, tasks in enumerate(phases) if t in tasks])
        if folder and folder.parameters["data_sha256"] != stream.fingerprint:
            began, now = (digest[:12] for digest in (folder.parameters["data_sha256"], stream.fingerprint))
            raise UserError(
                f"--resume {folder.path} began with other data (SHA-256 {began}…) than --data_path"
                f" {config.run.data_path} has now ({now}…): bring those back."
            )
        agnostic = bool(stream.classes_per_task)
        self.loop = Loop(build_learner(config, stream), stream, phases, **self._loop_options(), task_agnostic=agnostic)
        if config.run.pretrained and checkpoint is None:
            saved_network.put_into(self.loop.learner, config.run.pretrained)
        with self.interruption.finishing():
            folder = folder or self._own(RunFolder.create(config, stream.fingerprint))
            self.folder, self.checkpoints = folder, Checkpoints(folder.checkpoints)
            self._go_on(checkpoint)
        for note in self.notes:
            say(f"note: {note}", sys.stderr)
        return self._finish()

    def _own(self, folder: RunFolder) -> RunFolder:
        self.owned.callback(folder.close)
        return folder

    # ------------------------------------------------------------ what came before

    def _earlier_folder(self) -> RunFolder | None:
        """The folder to go on in, if this is to go on with an earlier run."""
        path = self.config.resume
        if self.config.resume_auto:
            path = run_folder.matching(self.config)
        return self._own(RunFolder.reopen(path, self.config)) if path else None

    def _checkpoint(self, folder: RunFolder) -> dict | None:
        """Where the earlier run stopped; None: before its first checkpoint."""
        content, self.notes = Checkpoints(folder.checkpoints).load()
        if content is None and run_folder.summary_of(folder.path):
            raise UserError(f"--resume {folder.path} has a record, but no checkpoint any more: start the run anew.")
        self.notes += parameters.changes(folder.parameters)
        return content

    def _go_on(self, checkpoint: dict | None) -> None:
        """Puts learner, loop and record where the checkpoint says, None being the start."""
        config, folder, n_phases = self.config, self.folder, len(self.loop.phases)
        try:
            if checkpoint:
                if run_folder.lasting(checkpoint["options"]) != run_folder.lasting(folder.parameters["options"]):
                    raise ValueError(f"its options are not those of {parameters.NAME}")
                self.loop.learner.load_state_dict(checkpoint["learner"])
                self.loop.load_state_dict(checkpoint["loop"])
                self.resumed_at_steps = (*checkpoint["resumed_at_steps"], self.loop.step)
                self.peak_memory = checkpoint["peak_memory_bytes"]
            state = checkpoint and checkpoint["record"]
            self.record = Record(config, folder, self.learned_at, n_phases, state)
            self.notes += self.record.notes
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"--resume {folder.path}: its checkpoint does not fit this run"
                f" ({type(error).__name__}: {str(error).splitlines()[0][:150]}): start the run anew, without --resume."
            ) from None
        self.owned.callback(self.record.release)
        if folder.reopened:
            where = f"from step {self.loop.step}" if checkpoint else "from the start: it has no checkpoint yet"
            self.notes.append(f"going on with {folder.path} {where}.")

    # ------------------------------------------------------------ the parts

    def _loop_options(self) -> dict:
        o = self.config.run
        return {
            **{
                name: getattr(o, name)
                for name in ("n_epochs", "batch_size", "log_every", "evaluate_tasks", "evaluate_after")
            },
            "splits": (o.evaluate_on,),
            "final_splits": ("test",) if o.calc_test_accuracy and o.evaluate_on != "test" else (),
        }

    # ------------------------------------------------------------ the run itself

    def _finish(self) -> Result:
        """Trains to the end, or until it is asked to stop, and closes the record."""
        interruption = self.interruption
        interruption.at_once = lambda: self.loop.evaluating
        whole = True
        try:
            self._drive()
        except Stopped as stopped:
            whole = stopped.whole
        interruption.finish()
        ended = self.loop.ended
        if whole and not ended:
            self._save_checkpoint()
        if not self.record.evaluations:
            if ended:
                raise UserError("every replica diverged before the first evaluation: lower the rates.", exit_code=3)
            raise UserError(
                f"interrupted before there was anything to record: go on with --resume {self.folder.path}.",
                exit_code=interruption.exit_code,
            )
        result = self.record.close(self._outcome(0 if ended else interruption.exit_code))
        if ended:
            self.folder.remove_checkpoints()
        return result

    def _drive(self) -> None:
        """Runs the loop until it ends or is to stop, with checkpoints, and a progress bar: task, loss, accuracy."""
        loop, accuracy = self.loop, ""
        tqdm.tqdm.monitor_interval = 0  # no thread of its own
        screen = Tolerant(sys.stderr)
        interval = 0.3 if screen.isatty() else 20
        saved, cost = time.monotonic(), 0.0
        form = {"mininterval": interval, "unit": "batch", "dynamic_ncols": True, "file": screen}
        with tqdm.tqdm(total=loop.total_steps, initial=loop.steps_done, **form) as bar:
            for event in loop:
                self.record.add(event)
                if isinstance(event, Evaluation):
                    if event.phase == -1 and loop.learner.pretraining_steps:
                        network, weights = loop.learner.network, loop.learner.weights
                        self.record.save_networks(network.layout.named(weights), loop.divergence.faults)
                    accuracy = self._accuracy(event) or accuracy
                else:
                    if bar.n + 1 >= bar.last_print_n + bar.miniters or bar.n % 50 == 0:
                        task = f"task {event.phase + 1}/{len(loop.phases)}" if event.phase >= 0 else "meta-training"
                        bar.set_description(task, refresh=False)
                        bar.set_postfix_str(f"loss {float(event.loss.mean()):.3f}{accuracy}", refresh=False)
                    bar.update()
                if self.interruption.exit_code:
                    break
                ends_phase = isinstance(event, Evaluation) and event.ends_phase
                since = time.monotonic() - saved
                worth = cost < ALWAYS_WORTH or since >= cost / CHECKPOINT_SHARE
                if (ends_phase and worth) or since >= 60 * self.config.run.checkpoint_minutes:
                    with self.interruption.finishing(), loop.pause():
                        began = time.monotonic()
                        self._save_checkpoint()
                    saved = time.monotonic()
                    cost = saved - began

    def _accuracy(self, evaluation: Evaluation) -> str:
        learnt = torch.from_numpy(self.learned_at <= evaluation.phase)
        if not learnt.any():
            return ""
        return f", accuracy so far {float(next(iter(evaluation.accuracy.values()))[:, learnt].nanmean()):.3f}"

    def _save_checkpoint(self) -> None:
        content = {
            "learner": self.loop.learner.state_dict(copied=False),
            "loop": self.loop.state_dict(),
            "record": self.record.state_dict(),
            "options": self.folder.parameters["options"],
            "resumed_at_steps": list(self.resumed_at_steps),
            "peak_memory_bytes": self._peak_memory(),
        }
        try:
            self.checkpoints.save(self.loop.done, content)
        except OSError as error:
            raise UserError(
                f"a checkpoint cannot be written to {self.checkpoints.folder} ({error}): make room, then go on with"
                f" --resume {self.folder.path}."
            ) from None

    def _outcome(self, interrupted: int) -> Outcome:
        loop = self.loop
        return Outcome(
            faults=loop.divergence.faults,
            interrupted=interrupted,
            steps=loop.step,
            resumed_at_steps=self.resumed_at_steps,
            train_seconds=loop.train_seconds,
            evaluation_seconds=loop.evaluation_seconds,
            peak_memory_bytes=self._peak_memory(),
            parameters=loop.divergence.parameters(loop.learner.named_parameters()),
        )

    def _peak_memory(self) -> int:
        """Bytes: of the device if it is a GPU, else of this process; of all parts of a run, the most."""
        if self.device.type == "cuda":
            return max(self.peak_memory, torch.cuda.max_memory_allocated(self.device))
        return max(self.peak_memory, _peak_resident_set())


def _peak_resident_set() -> int:
    """Bytes. What getrusage says begins with the peak of the process that started this one, so only without /proc."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
