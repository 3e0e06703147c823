"""One run from its configuration to its record."""

import contextlib
import os
import re
import resource
import signal
import sys

import numpy as np
import torch
from tqdm import tqdm

from dataloaders.registry import build_stream
from model.networks import build_network
from utils.config import Config
from utils.errors import UserError
from utils.loop import Evaluation, Loop
from utils.record import Outcome, Record, Result


def run(config: Config) -> Result:
    """Trains, evaluates and records. UserError for what cannot work; an interruption ends in a record that says so."""
    try:
        return _run(config)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate|overflow", str(error)):
            raise
        needs = "--memories or --n_memories, --n_hiddens, --batch_size or the number of seeds"
        raise UserError(f"this run needs more memory than {config.run.device} has: lower {needs}.") from None


def _run(config: Config) -> Result:
    torch.set_num_threads(config.run.threads or os.cpu_count())
    device = torch.device(config.run.device)
    stream = build_stream(config.dataset, config.stream, config.run.data_path).to(device)
    phases = [list(range(stream.n_tasks))] if config.algorithm.joint else [[t] for t in range(stream.n_tasks)]
    learned_at = np.array([phase for t in range(stream.n_tasks) for phase, tasks in enumerate(phases) if t in tasks])
    network = build_network(config.network, stream.input_shape, stream.n_classes)
    network = config.algorithm.network(network, stream.n_tasks)
    learner = config.algorithm.learner(network, config.learner, config.seeds, device=device)
    if config.run.log_alignment:
        learner.watch_alignment()
    record = Record(config, learned_at, len(phases))

    splits = (config.run.evaluate_on,)
    extra = ("test",) if config.run.calc_test_accuracy and splits != ("test",) else ()
    o = config.run
    loop = Loop(learner, stream, phases, o.n_epochs, o.batch_size, o.log_every, splits, extra, o.evaluate_tasks)
    interrupted = False
    try:
        _drive(loop, record, learned_at)
    except KeyboardInterrupt:
        interrupted = True
        if not record.evaluations:
            raise UserError("interrupted before there was anything to record.", exit_code=130) from None
    outcome = Outcome(
        diverged_at=loop.diverged_at.tolist(),
        interrupted=interrupted,
        steps=loop.step,
        train_seconds=loop.train_seconds,
        evaluation_seconds=loop.evaluation_seconds,
        peak_memory_bytes=_peak_memory(device),
        parameters=learner.named_parameters(),
    )
    with _uninterrupted():
        return record.close(outcome)


@contextlib.contextmanager
def _uninterrupted():
    """Ctrl-C waits: a record is written whole, however often a person presses it."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _drive(loop: Loop, record: Record, learned_at: np.ndarray) -> None:
    """Runs the loop to its end, with a progress bar: task, loss, accuracy on the tasks learnt so far, time left."""
    accuracy = ""
    interval = 0.3 if sys.stderr.isatty() else 20
    with tqdm(total=loop.total_steps, mininterval=interval, unit="batch", dynamic_ncols=True) as bar:
        for event in loop:
            record.add(event)
            if isinstance(event, Evaluation):
                learnt = torch.from_numpy(learned_at <= event.phase)
                if learnt.any():
                    accuracy = (
                        f", accuracy so far {float(next(iter(event.accuracy.values()))[:, learnt].nanmean()):.3f}"
                    )
                continue
            if bar.n + 1 >= bar.last_print_n + bar.miniters or bar.n % 50 == 0:
                bar.set_description(f"task {event.phase + 1}/{len(loop.phases)}", refresh=False)
                bar.set_postfix_str(f"loss {float(event.loss.mean()):.3f}{accuracy}", refresh=False)
            bar.update()


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device if it is a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
