"""Meta-test: `python -m utils.meta_test --networks logs/anml/RUN` sweeps learning rates, makes a table and a plot.

A network that was meta-trained (network.pt, see utils/saved_network.py) learns trajectories of classes, one image at a
time; what it then knows is measured after 10, 50, … 600 of them, on the images learnt from and on those held out. Its
learning rate is chosen on classes that meta-training did not see (--validation of the run that made the network) and
that are no test classes. A trajectory longer than there are such classes takes the rate of the longest that is not.

What stays as it is, all but the output layer, is computed once for each image, and only output layers learn, those of
all runs and rates; numbers are those of `main.py --pretrained FILE --seeds 0 1 …` with the same rate (tests/
test_meta_test.py).

Stopped (Ctrl-C, SIGTERM, a crash), it loses the trajectory that it is at: the same command again goes on.
"""

import dataclasses
import hashlib
import json
import os
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
from utils.experiment import TOO_LARGE, build_learner
from utils.interruption import Interruption, Stopped
from utils.options import option
from utils.record import spread

NAME = "meta_test.json"
FLAG = "--networks"

#: Images whose features, or logits, are computed at once.
CHUNK = 200

#: Options that change no number.
PLACES = ("networks", "out", "data_path", "device", "threads")

#: What networks of one table have in common, beside the algorithm and saved_network.TAKEN_OVER: how they were trained.
TRAINING = (
    *("init", "alpha_init", "second_order", "scope", "zap", "gate_bias", "meta_iterations", "meta_lr"),
    *("episode_classes", "episode_images", "remember_images", "fresh", "split_classes"),
)


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
        (0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01),
        "linear: learning rates of Adam to choose from",
    )
    prior_strengths: tuple[float, ...] = option(
        (1.0, 3.0, 10.0, 30.0, 100.0, 300.0), "gaussian: values of --prior_strength to choose from"
    )
    shots: int = option(15, "images of each class that are learnt", low=1, high=19)
    runs: int = option(10, "trajectories on test classes, per network; run r is --seed r of main.py", low=1, high=100)
    validation_runs: int = option(3, "trajectories on validation classes, per network", low=1, high=100)
    out: str = option(
        "",
        "folder for meta_test.json, meta_test.md and meta_test.png; if none is given, one in logs/meta_test for these"
        " networks and options",
    )
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
        saved = saved_network.load(file, FLAG)
        self.length = min(longest, _pool(saved, trajectory))
        self.key = [saved_network.digest(str(file), [0]), trajectory, options.head, options.shots, self.length]
        given = {"model": saved["model"], "dataset": "omniglot", "pretrained": str(file), "trajectory": trajectory}
        given |= {"seeds": [str(seed) for seed in seeds], "data_path": options.data_path, "device": options.device}
        given |= {"samples_per_task": options.shots, "online": "finetune", "finetune_scope": "head", "head": "linear"}
        config = resolve({**given, "n_tasks": self.length})
        stream = build_stream(config.dataset, config.stream, options.data_path).to(options.device)
        self.seeds, heads = list(seeds), []
        for seed in self.seeds:  # one learner at a time: of each, only the output layer is kept
            learner = build_learner(dataclasses.replace(config, seeds=(seed,)), stream)
            saved_network.put_into(learner, str(file), FLAG)
            self.network = learner.network
            if not heads:
                self._see(learner, stream)
            learner.begin_task(0)
            heads.append(learner.weights[:, self.network.first_column("head") :].clone())
        #: Output layers as the runs begin with them, [runs, n].
        self.heads = torch.cat(heads)

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
                found.append(self.network.features(learner.weights, x)[0])
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


class Journal:
    """What is measured already: a file with a line of JSON for each trajectory that was learnt to its end."""

    def __init__(self, path: Path):
        self.path, self._known = path, {}
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            try:
                key, values = json.loads(line)
            except ValueError:  # cut off in the middle
                continue
            self._known[json.dumps(key)] = {int(n): found for n, found in values.items()}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: list, stops: list[int]) -> dict[int, dict[str, float]]:
        """Number of classes -> split -> accuracy; empty unless it is known for all of them."""
        known = self._known.get(json.dumps(key), {})
        return {n: known[n] for n in stops} if all(n in known for n in stops) else {}

    def add(self, key: list, values: dict[int, dict[str, float]]) -> None:
        values = {**self._known.get(json.dumps(key), {}), **values}
        self._known[json.dumps(key)] = values
        with self.path.open("a") as file:
            file.write("\n" * (file.tell() > 0) + json.dumps([key, values]))
            file.flush()
            os.fsync(file.fileno())


#: (setting, number of classes) -> split -> accuracy of every run. A setting is a rate or a prior's strength.
Accuracies = dict[tuple[float, int], dict[str, list[float]]]


def measure(trajectories: Trajectories, settings: list[float], stops: list[int], head: str, journal) -> Accuracies:
    """What the runs know after every number of classes in `stops`, with every setting; written to the journal."""

    def key(run: int, setting: float) -> list:
        return [*trajectories.key, setting, trajectories.seeds[run]]

    runs = range(len(trajectories.seeds))
    jobs = [(run, setting) for setting in settings for run in runs]
    left = [job for job in jobs if not journal.get(key(*job), stops)]
    groups = [[job] for job in left]  # on a CPU one after the other: its caches hold one output layer with its moments
    if trajectories.table.is_cuda:
        alike = [left] if head == "linear" else [[job for job in left if job[1] == setting] for setting in settings]
        groups = [group for group in alike if group]
    screen = Tolerant(sys.stderr)
    for group in tqdm.tqdm(groups, unit="run", file=screen, mininterval=0.3 if screen.isatty() else 20):
        some_runs, some = [run for run, _ in group], [setting for _, setting in group]
        if head == "linear":
            learning = trajectories.learn(some_runs, some, stops)
        else:
            learning = trajectories.count(some_runs, StatisticsHead(head, some[0]), stops)
        values = {job: {} for job in group}
        for n, scores in learning:
            found = trajectories.accuracies(some_runs, n, scores)
            for i, job in enumerate(group):
                values[job][n] = {split: of_runs[i].item() for split, of_runs in found.items()}
        for job in group:
            journal.add(key(*job), values[job])
    found = {job: journal.get(key(*job), stops) for job in jobs}
    return {
        (setting, n): {split: [found[run, setting][n][split] for run in runs] for split in ("train", "test")}
        for setting in settings
        for n in stops
    }


def checked(options: MetaTestOptions) -> dict[Path, dict]:
    """The networks by their files. UserError for whatever cannot work, before anything is measured or written."""
    if max(options.lengths) > EVALUATION:
        raise UserError(
            f"--lengths {max(options.lengths)} is more than the {EVALUATION} classes that there are: give fewer."
        )
    networks = {file: saved_network.load(file, FLAG) for file in files(options.networks)}
    first, kind = next((file, _kind(saved)) for file, saved in networks.items())
    for file, saved in networks.items():
        if odd := [name for name, value in _kind(saved).items() if kind.get(name) != value]:
            raise UserError(
                f"--networks mixes kinds: {file} has {odd[0]} {_kind(saved)[odd[0]]}, {first} {kind.get(odd[0])}; a"
                " table is of seeds of one kind: give each kind alone."
            )
        if len(_settings(options)) > 1 and not _pool(saved, "validation"):
            single = "--prior_strengths 10" if options.head == "gaussian" else "--rates 0.001"
            raise UserError(
                f"{file} was meta-trained on all background classes (--validation 0), so nothing is left to choose on:"
                f" give a single value, such as {single}."
            )
    return networks


def _kind(saved: dict) -> dict:
    """What networks of one table have in common."""
    names = (*saved_network.TAKEN_OVER, *TRAINING)
    return {"model": saved["model"], **{name: saved["options"].get(name) for name in names}}


def _pool(saved: dict, trajectory: str) -> int:
    """How many classes there are for it that the network never saw."""
    return TrajectoryOptions(trajectory=trajectory, validation=float(saved["options"]["validation"])).there


def _settings(options: MetaTestOptions) -> list[float]:
    """What there is to choose from."""
    settings = {"linear": options.rates, "gaussian": options.prior_strengths, "prototype": (1.0,)}[options.head]
    return sorted(set(settings))


def meta_test(options: MetaTestOptions, networks: dict[Path, dict], journal: Journal) -> dict:
    """Everything measured, as meta_test.json has it. networks: see `checked`."""
    lengths, settings = sorted(set(options.lengths)), _settings(options)
    tests: dict[int, dict[str, list[list[float]]]] = {n: {"train": [], "test": []} for n in lengths}
    told = []
    for file, saved in networks.items():
        chosen, validation = dict.fromkeys(lengths, settings[0]), None
        if len(settings) > 1:
            seeds = range(options.validation_runs)
            held = Trajectories(file, options, "validation", seeds, max(lengths))
            stops = sorted({*(n for n in lengths if n <= held.length), held.length})
            validation = measure(held, settings, stops, options.head, journal)
            for n in lengths:
                at = min(n, held.length)
                chosen[n] = max(settings, key=lambda s, at=at: float(np.mean(validation[s, at]["test"])))
        trajectories = Trajectories(file, options, "test", range(options.runs), max(lengths))
        for setting in sorted(set(chosen.values())):
            stops = [n for n in lengths if chosen[n] == setting]
            for (_, n), values in measure(trajectories, [setting], stops, options.head, journal).items():
                for split in ("train", "test"):
                    tests[n][split].append(values[split])
        told.append(
            {
                "file": str(file),
                **{name: saved[name] for name in ("model", "options")},
                "chosen": [chosen[n] for n in lengths],
                "validation": validation and [
                    {"setting": setting, "classes": n, **{split: spread(np.array(v)) for split, v in values.items()}}
                    for (setting, n), values in validation.items()
                ],
            }
        )  # fmt: skip
    results = [
        {
            "classes": n,
            **{split: spread(np.concatenate(of_networks)) for split, of_networks in tests[n].items()},
            "means_of_networks": {split: spread(np.mean(of_networks, 1)) for split, of_networks in tests[n].items()},
        }
        for n in lengths
    ]
    program = {"commit": parameters.commit(), "versions": parameters.versions()}
    return {"options": dataclasses.asdict(options), **program, "networks": told, "results": results}


def identity(options: MetaTestOptions, networks: dict[Path, dict]) -> str:
    """A digest of what decides the numbers: the networks' files, and the options but for where things lie and run."""
    decisive = {name: value for name, value in dataclasses.asdict(options).items() if name not in PLACES}
    digests = [saved_network.digest(str(file), [0]) for file in networks]
    return hashlib.sha256(json.dumps([decisive, digests]).encode()).hexdigest()


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
    if len(content["networks"]) > 1:
        apart = max(row["means_of_networks"]["test"]["std"] for row in content["results"])
        lines.append(f"Of the networks' own means, the standard deviation is at most {apart:.4f}.")
    lines += _at_the_edge(content)
    return "\n".join(lines)


def _at_the_edge(content: dict) -> list[str]:
    """A sentence for each end of the range of settings that was chosen: better ones may lie beyond it."""
    flag = {"linear": "rates", "gaussian": "prior_strengths"}.get(content["options"]["head"])
    settings, lines = content["options"][flag] if flag else [], []
    if len(set(settings)) > 1:
        for edge, word, beyond in ((min(settings), "smallest", "smaller"), (max(settings), "largest", "larger")):
            at = [
                str(row["classes"])
                for i, row in enumerate(content["results"])
                if any(network["chosen"][i] == edge for network in content["networks"])
            ]
            if at:
                which = f"{', '.join(at)} classes"
                lines.append(f"The {word} of --{flag}, {edge:g}, was best for {which}: {beyond} may be better still.")
    return lines


def run(options: MetaTestOptions) -> None:
    """Measures, or goes on measuring, writes the records, and prints the table. OSError: they cannot be written."""
    networks = checked(options)
    whole = identity(options, networks)
    model = next(iter(networks.values()))["model"]
    out = Path(options.out or f"logs/meta_test/{model}-{options.head}-{whole[:8]}")
    done = out / NAME
    if done.exists():
        content = _read(done)
        if content.get("identity") != whole:
            raise UserError(f"--out {out} has a meta-test of other networks or options: give another folder.")
        say(f"{table(content)}\n\nmeasured before: records in {out}", sys.stdout)
        return
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "meta_test.jsonl")
    with Interruption() as interruption:
        try:
            content = {"identity": whole, **meta_test(options, networks, journal)}
        except Stopped:
            say(
                f"utils.meta_test: stopped; {len(journal)} trajectories are kept in {journal.path}: give the same"
                " command again to go on.",
                sys.stderr,
            )
            raise SystemExit(interruption.exit_code) from None
        with interruption.finishing():
            say(table(content), sys.stdout)
            atomic.write_text(out / "meta_test.md", table(content) + "\n")
            plots.save(out / "meta_test.png", plots.by_length(content["results"]))
            atomic.write_text(done, json.dumps(content, indent=1) + "\n")
            journal.path.unlink(missing_ok=True)
    say(f"\nrecords in {out}", sys.stdout)


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        table(content)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} is no record of a meta-test: remove it, or give another --out.") from None
    return content


def main(argv: list[str] | None = None) -> None:
    with one_sentence("utils.meta_test"):
        options = parse(MetaTestOptions, sys.argv[1:] if argv is None else argv, "utils.meta_test", __doc__)
        check_device(options.device)
        torch.set_num_threads(options.threads or torch.get_num_threads())
        torch.backends.cudnn.allow_tf32 = False  # as main.py
        try:
            run(options)
        except OSError as error:
            raise UserError(f"--out cannot be written ({error}): make room, or give another folder.") from None
        except RuntimeError as error:
            if not TOO_LARGE.search(str(error)):
                raise
            raise UserError("the meta-test does not fit into memory: give fewer --runs, or fewer --lengths.") from None


if __name__ == "__main__":
    keep_freed_memory()
    main()
