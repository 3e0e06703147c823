"""Meta-test: `python -m utils.meta_test --networks logs/anml/RUN` sweeps learning rates, makes a table and a plot.

A network that was meta-trained (network.pt, see utils/saved_network.py) learns trajectories of classes, one image at a
time; what it then knows is measured after 10, 50, … 600 of them, on the images learnt from and on those held out. Its
learning rate is chosen on classes that meta-training did not see (--validation of the run that made the network) and
that are no test classes. A trajectory longer than there are such classes takes the rate of the longest that is not.

What stays as it is, all but the output layer, is computed once for each image, and only output layers learn, those of
all runs and rates; numbers are those of `main.py --pretrained FILE --seeds 0 1 …` with the same rate (tests/
test_meta_test.py).
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tqdm
from torch import Tensor

from dataloaders.registry import build_stream
from dataloaders.stream import data_order
from dataloaders.trajectories import EVALUATION, TrajectoryOptions
from model.adam import Adam
from model.batch import Batch
from model.finetune import head_loss_and_gradient
from model.statistics_heads import StatisticsHead
from utils import atomic, parameters, plots, saved_network
from utils.allocator import keep_freed_memory
from utils.command_line import check_device, one_sentence, parse
from utils.config import resolve
from utils.console import Tolerant, say
from utils.errors import UserError
from utils.experiment import build_learner
from utils.options import option
from utils.record import spread

#: Images whose features, or logits, are computed at once.
CHUNK = 200


@dataclasses.dataclass(frozen=True)
class MetaTestOptions:
    networks: tuple[str, ...] = option(
        (), "network.pt of one or more meta-training seeds, or folders of runs: those of all their seeds"
    )
    head: Literal["linear", "prototype", "gaussian"] = option(
        "linear", "how classes are told apart: see --head of main.py"
    )
    lengths: tuple[int, ...] = option((10, 50, 75, 100, 200, 300, 400, 600), "numbers of classes to measure after")
    rates: tuple[float, ...] = option(
        (0.0003, 0.0006, 0.0008, 0.001, 0.0015, 0.002, 0.003), "linear: learning rates of Adam to choose from"
    )
    prior_strengths: tuple[float, ...] = option(
        (1.0, 3.0, 10.0, 30.0, 100.0), "gaussian: values of --prior_strength to choose from"
    )
    shots: int = option(15, "images of each class that are learnt", low=1, high=19)
    runs: int = option(10, "trajectories on test classes, per network; run r is --seed r of main.py", low=1, high=1000)
    validation_runs: int = option(3, "trajectories on validation classes, per network", low=1, high=1000)
    out: str = option("logs/meta_test", "folder for meta_test.json, meta_test.md and meta_test.png")
    data_path: str = option("data", "folder that get_data.py fills")
    device: str = option("cpu", "cpu, cuda, or cuda:N")
    threads: int = option(1, "CPU threads; 0: PyTorch's choice", low=0, high=1024)


class Trajectories:
    """What a network's runs on one pool of classes learn, as features, and what is held out of it.

    Args:
        file: network.pt. options: see above. trajectory: "test" or "validation". seeds: of the runs.
        longest: classes wanted; `length` is how many there are.
    """

    def __init__(self, file: Path, options: MetaTestOptions, trajectory: str, seeds, longest: int):
        saved = saved_network.load(file, "--networks")
        held = TrajectoryOptions(trajectory=trajectory, validation=saved["options"].get("validation", 0.0))
        if not held.there:
            single = "--prior_strengths 10" if options.head == "gaussian" else "--rates 0.001"
            raise UserError(
                f"{file} was meta-trained on all background classes (--validation 0), so nothing is left to choose on:"
                f" give a single value, such as {single}."
            )
        self.length = min(longest, held.there)
        given = {"model": saved["model"], "dataset": "omniglot", "pretrained": str(file), "trajectory": trajectory}
        given |= {"seeds": [str(seed) for seed in seeds], "data_path": options.data_path, "device": options.device}
        given |= {"samples_per_task": options.shots, "online": "finetune", "finetune_scope": "head", "head": "linear"}
        config = resolve({**given, "n_tasks": self.length})
        stream = build_stream(config.dataset, config.stream, options.data_path).to(options.device)
        learner = build_learner(config, stream)
        saved_network.put_into(learner, str(file))
        self.network, self.seeds = learner.network, list(seeds)
        self._see(learner, stream)
        learner.begin_task(0)
        #: Output layers as the runs begin with them, [runs, n].
        self.heads = learner.weights[:, self.network.first_column("head") :].clone()

    def _see(self, learner, stream) -> None:
        """Computes the features of every image once.

        table: [images, units]. places: split -> [runs, length * images of a class], rows of the table; those to learn
        from are in the order in which they come.
        """
        rows = {}
        for split in ("train", "test"):
            of_runs = [[stream.rows(t, split, seed) for t in range(self.length)] for seed in self.seeds]
            rows[split] = torch.stack([torch.stack(of_run) for of_run in of_runs])
        self.shots = rows["train"].shape[2]
        for run, seed in enumerate(self.seeds):
            for t in range(self.length):
                rows["train"][run, t] = rows["train"][run, t, data_order(seed, t, 0, self.shots)]
        needed, place = torch.cat([part.flatten() for part in rows.values()]).unique(return_inverse=True)
        images, found = stream.pool.flatten(0, 1), []
        for some in needed.split(CHUNK):
            x = stream.to_float(images[some.to(images.device)])[None]
            with torch.no_grad():
                found.append(self.network.features(learner.weights[:1], x)[0])
        self.table = torch.cat(found)
        places = place.to(self.table.device).split([part.numel() for part in rows.values()])
        self.places = {split: p.view(len(self.seeds), -1) for split, p in zip(rows, places, strict=True)}

    def images(self, split: str, runs: list[int], n: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Features [runs, images, units] and classes [runs, images] of classes number first to n - 1 of some runs."""
        each = self.places[split].shape[1] // self.length
        y = torch.arange(first, n, device=self.table.device).repeat_interleave(each)
        return self.table[self.places[split][runs, first * each : n * each]], y.expand(len(runs), -1)

    def learn(self, runs: list[int], rates: list[float], stops: list[int]) -> Iterator[tuple[int, Callable]]:
        """Runs of the output layer side by side, an image at a time, each at its rate.

        Yields each of `stops` when so many classes are learnt, with the function features -> logits that is then known.
        """
        heads, adam = self.heads[runs], Adam()
        places = self.places["train"][runs]
        for i in range(max(stops) * self.shots):
            y = torch.full((len(runs), 1), i // self.shots, device=heads.device)
            z = self.table[places[:, i : i + 1]]
            _, gradient = head_loss_and_gradient(self.network, heads, Batch(z, y, y), z)
            adam.step_(heads, gradient, rates)
            learnt, rest = divmod(i + 1, self.shots)
            if not rest and learnt in stops:
                yield learnt, lambda features: self.network.classify(heads, features)

    def count(self, runs: list[int], head: StatisticsHead, stops: list[int]) -> Iterator[tuple[int, Callable]]:
        """The same with a head that only counts."""
        before = 0
        for n in stops:
            head.add(*self.images("train", runs, n, before), self.network.classes)
            before = n
            yield n, lambda features: head.scores(features, self.network.classes)

    def accuracies(self, runs: list[int], n: int, scores) -> dict[str, Tensor]:
        """Split -> the fraction [runs] of the images of the first n classes that are told right."""
        found = {}
        for split in ("train", "test"):
            x, y = self.images(split, runs, n)
            chunks = list(zip(x.split(CHUNK, 1), y.split(CHUNK, 1), strict=True))
            found[split] = sum(_right(scores(some_x), some_y) for some_x, some_y in chunks).cpu() / y.shape[1]
        return found


def _right(logits: Tensor, y: Tensor) -> Tensor:
    """How many of each run's images are told right; none whose logits are no finite numbers."""
    return ((logits.argmax(dim=2) == y) & logits.isfinite().all(dim=2)).sum(dim=1)


#: (setting, number of classes) -> split -> accuracy of every run. A setting is a rate or a prior's strength.
Accuracies = dict[tuple[float, int], dict[str, list[float]]]


def measure(trajectories: Trajectories, settings: list[float], stops: list[int], head: str) -> Accuracies:
    """What the runs know after every number of classes in `stops`, with every setting."""
    runs, found = range(len(trajectories.seeds)), {}
    jobs = [(run, setting) for setting in settings for run in runs]
    size = 1  # on a CPU one after the other: its caches hold one output layer with its moments, not two
    if trajectories.table.is_cuda:
        size = len(jobs) if head == "linear" else len(runs)
    screen = Tolerant(sys.stderr)
    for first in tqdm.trange(0, len(jobs), size, unit="run", file=screen, mininterval=0.3 if screen.isatty() else 20):
        group = jobs[first : first + size]
        some_runs, some = [run for run, _ in group], [setting for _, setting in group]
        if head == "linear":
            learning = trajectories.learn(some_runs, some, stops)
        else:
            learning = trajectories.count(some_runs, StatisticsHead(head, some[0]), stops)
        for n, scores in learning:
            for split, values in trajectories.accuracies(some_runs, n, scores).items():
                for setting, value in zip(some, values.tolist(), strict=True):
                    found.setdefault((setting, n), {}).setdefault(split, []).append(value)
    return found


def meta_test(options: MetaTestOptions) -> dict:
    """Everything measured, as meta_test.json has it."""
    lengths = sorted(set(options.lengths))
    if max(lengths) > EVALUATION:
        raise UserError(f"--lengths {max(lengths)} is more than the {EVALUATION} classes that there are: give fewer.")
    settings = {"linear": options.rates, "gaussian": options.prior_strengths, "prototype": (1.0,)}[options.head]
    settings = sorted(set(settings))
    tests: dict[int, dict[str, list[float]]] = {n: {"train": [], "test": []} for n in lengths}
    networks = []
    for file in dict.fromkeys(files(options.networks)):
        chosen, validation = dict.fromkeys(lengths, settings[0]), None
        if len(settings) > 1:
            seeds = range(options.validation_runs)
            held = Trajectories(file, options, "validation", seeds, max(lengths))
            stops = sorted({*(n for n in lengths if n <= held.length), held.length})
            validation = measure(held, settings, stops, options.head)
            for n in lengths:
                at = min(n, held.length)
                chosen[n] = max(settings, key=lambda s, at=at: float(np.mean(validation[s, at]["test"])))
        trajectories = Trajectories(file, options, "test", range(options.runs), max(lengths))
        for setting in sorted(set(chosen.values())):
            stops = [n for n in lengths if chosen[n] == setting]
            for (_, n), values in measure(trajectories, [setting], stops, options.head).items():
                for split in ("train", "test"):
                    tests[n][split] += values[split]
        networks.append(
            {
                "file": str(file),
                **{name: saved_network.load(file)[name] for name in ("model", "options")},
                "chosen": [chosen[n] for n in lengths],
                "validation": validation and [
                    {"setting": setting, "classes": n, **{split: spread(np.array(v)) for split, v in values.items()}}
                    for (setting, n), values in validation.items()
                ],
            }
        )  # fmt: skip
    results = [{"classes": n, **{split: spread(np.array(v)) for split, v in tests[n].items()}} for n in lengths]
    told = {"commit": parameters.commit(), "versions": parameters.versions()}
    return {"options": dataclasses.asdict(options), **told, "networks": networks, "results": results}


def files(networks: tuple[str, ...]) -> list[Path]:
    """The network.pt files that are meant. UserError if there are none."""
    found: list[Path] = []
    for name in networks:
        path = Path(name)
        inside = sorted(path.glob(f"*/{saved_network.NAME}"), key=lambda p: p.parent.name.zfill(20))
        here = [path / saved_network.NAME] if (path / saved_network.NAME).exists() else []
        found += (here or inside) if path.is_dir() else [path]
    if not found:
        raise UserError(
            f"--networks {' '.join(networks)} has no {saved_network.NAME}: give one, or the folder of a run that"
            " meta-trained, such as logs/anml/RUN."
        )
    return found


def table(content: dict) -> str:
    """The results in Markdown."""
    head, runs = content["options"]["head"], len(content["results"][0]["test"]["values"])
    name = {"linear": "learning rate", "gaussian": "strength of the prior"}.get(head)
    lines = [
        f"| classes | held-out accuracy | accuracy on what was learnt |{f' {name} |' if name else ''}",
        "|" + "---:|" * (4 if name else 3),
    ]
    for i, row in enumerate(content["results"]):
        chosen = sorted({network["chosen"][i] for network in content["networks"]})
        cells = [f"{row[s]['mean']:.4f} ± {row[s]['std'] or 0:.4f}" for s in ("test", "train")]
        cells += [", ".join(f"{value:g}" for value in chosen)] if name else []
        lines.append(f"| {row['classes']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Head {head}; mean and standard deviation over {runs} runs of {len(content['networks'])} network(s).",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    with one_sentence("utils.meta_test"):
        options = parse(MetaTestOptions, sys.argv[1:] if argv is None else argv, "utils.meta_test", __doc__)
        check_device(options.device)
        torch.set_num_threads(options.threads or torch.get_num_threads())
        torch.backends.cudnn.allow_tf32 = False  # as main.py
        out = Path(options.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made ({error}): give another folder.") from None
        content = meta_test(options)
        say(table(content), sys.stdout)
        try:
            atomic.write_text(out / "meta_test.json", json.dumps(content, indent=1) + "\n")
            atomic.write_text(out / "meta_test.md", table(content) + "\n")
            plots.save(out / "meta_test.png", plots.by_length(content["results"]))
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error}): make room, or give another folder.") from None
        say(f"\nrecords in {out}", sys.stdout)


if __name__ == "__main__":
    keep_freed_memory()
    main()
