"""From a command line to a checked configuration: every value typed, in range, and with its source known.

A value comes from the command line if it was given there; else from --as_published; else from papers/, if there is a
row for the algorithm and the stream; else from the registry's presets or the options' defaults.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Literal

import torch

from dataloaders.registry import DATASETS, Dataset
from dataloaders.stream import StreamOptions
from model.networks import NetworkOptions
from model.registry import ALGORITHMS, ALIASES, Algorithm, variant_of
from utils import papers, parameters, saved_network
from utils.command_line import Parser, check_device, flag_line, show
from utils.errors import UserError, nearest
from utils.options import Option, option, options_of


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a run is driven and kept; the same for every algorithm and stream."""

    n_epochs: int = option(1, "passes over each task's data", low=1, high=1_000_000)
    batch_size: int = option(10, "examples in each incoming batch", low=1, high=1_000_000)
    log_every: int = option(0, "batches between evaluations within a task; 0: only at the end of each task", low=0)
    evaluate_on: Literal["test", "validation"] = option(
        "test", "validation (needs --validation) is for choosing settings without looking at test data"
    )
    evaluate_tasks: Literal["all", "seen", "new"] = option(
        "all",
        "tasks in the evaluations between the first and the last: seen is those learnt so far and the next one, all"
        " that the metrics need; new is the one just learnt and the next, without forgetting and anytime accuracy",
    )
    evaluate_after: tuple[int, ...] = option(
        (),
        "numbers of tasks after which all tasks learnt so far are evaluated, whatever --evaluate_tasks says",
    )
    calc_test_accuracy: bool = option(
        False, "with --evaluate_on validation, also evaluate on the test data at the end of each task"
    )
    log_alignment: bool = option(
        False, "record at each evaluation how the gradients of new and replayed examples agree, and the learned rates"
    )
    pretrained: str = option(
        "",
        "saved network to start from: the network.pt of an earlier run, or the folder of a run that has one for every"
        " seed; it is not meta-trained again unless --meta_iterations is given, too",
    )
    expt_name: str = option("run", "first part of the name of the run's record")
    log_dir: str = option("logs", "folder that records are written to", flags=("save_path",))
    data_path: str = option("data", "folder that get_data.py fills")
    device: str = option("cpu", "cpu, cuda, or cuda:N")
    checkpoint_minutes: float = option(
        5.0,
        "minutes between checkpoints within a task (there is one at the end of each, unless tasks are very short);"
        " 0: after every batch",
        low=0,
        high=1e6,
    )
    time_limit: float = option(
        0.0,
        "minutes after which the run stops by itself, as if told to by SIGTERM, to be resumed; 0: none",
        low=0,
        high=1e6,
    )
    deterministic: bool = option(
        False,
        "let PyTorch use deterministic algorithms only: on a GPU repetitions are bit-identical, and some steps slower;"
        " on a CPU they are without it (docs/records.md has what it costs)",
    )
    threads: int = option(
        1, "CPU threads; with networks this small more of them only wait for each other; 0: all cores", low=0, high=1024
    )


DESCRIPTION = (
    "Learns a stream of tasks with one algorithm, for several seeds at once, and shows what was learnt and what was"
    " forgotten."
)

#: Flags of the older programs that do nothing here, or not for every stream, with the reason; given where they are no
#: option, they are noted and ignored.
RETIRED = {
    "loader": "the stream follows from --dataset",
    "workers": "data are kept on the device, there are no loader processes",
    "test_batch_size": "evaluation chooses its own chunks",
    "tf_dir": "TensorBoard events are written into the record",
    "shuffle_tasks": "tasks are learnt in order",
    "steps_per_sample": "the published code never read it",
    "fisher_gamma": "the published code never read it",
    "bgd_optimizer": "Meta-BGD has one optimiser, Bayesian gradient descent",
    "optimizer_params": "Meta-BGD's settings are flags of their own: --mean_eta, --std_init, --train_mc_iters",
    "class_order": "this stream has no tasks made of several classes of their own",
    "increment": "this stream has no tasks made of several classes of their own",
    "classes_per_it": "iid draws its batches from all tasks",
    "iterations": "iid passes --n_epochs times over all tasks",
}
SHORT = {"class_order": "-order", "increment": "-inc"}

ACTIONS = {
    "list": "print the algorithms and streams, and stop",
    "show_config": "print every value and where it comes from, and stop",
}

#: Options of every run that no dataclass holds; see `resolve`.
SPECIAL = {
    "model": "algorithm (see --list)",
    "dataset": "stream (see --list)",
    "data_file": "MER's spelling of --dataset, such as mnist_rotations.pt",
    "seed": "one seed",
    "seeds": "several seeds, trained side by side in one process (default: those of papers/, or else 0 1 2 3 4)",
    "cuda": "use a GPU if there is one (yes or no; --device cuda insists)",
    "xav_init": "older spelling of --init xavier_normal",
    "resume": "go on with a run that was stopped: its folder, or auto for the one of the same command, if there is one",
    "as_published": "switch the published code's deviations from the paper back on (docs/differences.md)",
}


#: Options that may be others when a run goes on: where things lie, on what and how long it runs.
MAY_CHANGE = {
    "log_dir", "data_path", "device", "threads", "checkpoint_minutes", "time_limit", "deterministic"
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, fully decided.

    sources: option name -> where its value comes from. notes: sentences that the user should read. resume: the folder
    of the run to go on with. resume_auto: go on with the last run of this very configuration, if there is one.
    pretrained_sha256: of the files that --pretrained names; empty where there are none.
    """

    algorithm: Algorithm
    dataset: Dataset
    seeds: tuple[int, ...]
    as_published: bool
    run: RunOptions
    network: NetworkOptions
    stream: StreamOptions
    learner: object
    sources: dict[str, str]
    notes: tuple[str, ...]
    resume: Path | None = None
    resume_auto: bool = False
    pretrained_sha256: str = ""

    def groups(self) -> dict[str, object]:
        return {"run": self.run, "network": self.network, "stream": self.stream, "learner": self.learner}

    @property
    def values(self) -> dict:
        """Option name -> value, over all four groups of options."""
        return {name: value for group in self.groups().values() for name, value in dataclasses.asdict(group).items()}

    def names(self) -> dict:
        """What is run, beside the values of options."""
        seeds = list(self.seeds)
        return {"model": self.algorithm.name, "dataset": self.dataset.name, "seeds": seeds}

    def identity(self) -> dict:
        """What decides the numbers of the run: everything but where files lie, its name, and what is logged besides."""
        logging = {"expt_name", "log_every", "log_alignment", "calc_test_accuracy"}
        chosen = {name: value for name, value in self.values.items() if name not in MAY_CHANGE | logging}
        network = {"pretrained_sha256": self.pretrained_sha256} if self.run.pretrained else {}
        return {**self.names(), "data": self.dataset.origin(self.run.data_path), **network, **chosen}

    def with_defaults(self, options: dict) -> dict:
        """Options of an earlier record and, of those that its version did not have, the defaults."""
        known = {name: o.default for group in self.groups().values() for name, o in options_of(type(group)).items()}
        return {**json.loads(json.dumps(known)), **options}


def configure(argv: list[str]) -> Config:
    """The configuration that a command line asks for.

    Raises:
        UserError: what cannot work, in one sentence.
        SystemExit: with code 0, after --help, --list or --show_config has printed.
    """
    given = _parse(argv)
    if "help" in given:
        show(help_text())
    if "list" in given:
        show(list_text())
    asked = given.pop("show_config", None)
    config = resolve(given)
    if asked is not None:
        show(config_text(config))
    return config


# ---------------------------------------------------------------- the command line


def _known_options() -> dict[str, Option]:
    """Every option of every group, by name."""
    classes = [
        RunOptions,
        NetworkOptions,
        *(d.options for d in DATASETS.values()),
        *(a.options for a in ALGORITHMS.values()),
    ]
    known: dict[str, Option] = {}
    for name, o in (item for cls in classes for item in options_of(cls).items()):
        flags = {*o.flags, *(known[name].flags if name in known else ())}
        known[name] = dataclasses.replace(o, flags=tuple(sorted(flags)))
    return known


def _parse(argv: list[str]) -> dict[str, str | list[str]]:
    """name -> text, for what the command line gives."""
    parser = Parser()
    for name in ACTIONS:
        parser.add_argument(f"--{name}", action="store_true")
    for name in SPECIAL:
        nargs = {"seeds": "+", "cuda": "?", "xav_init": "?", "as_published": "?"}.get(name)
        parser.add_argument(f"--{name}", nargs=nargs, const="yes" if nargs == "?" else None)
    parser.add_options(_known_options().values(), SHORT)
    for name in RETIRED.keys() - _known_options().keys():
        parser.add_argument(f"--{name}", nargs="?", const="yes")
    return parser.read(argv, "main.py")


# ---------------------------------------------------------------- deciding every value


def resolve(given: dict) -> Config:
    """Decides every value. given: option name -> text (or a list of texts for seeds), as written by the user."""
    given = dict(given)
    resume = given.pop("resume", None)
    if resume not in (None, "auto"):
        return _resumed(Path(resume), given)
    return _resolve(given, auto=resume == "auto")


def _resolve(given: dict, auto: bool = False, begun: bool = False) -> Config:
    """The same, for anything but --resume FOLDER. begun: given is all that a run was told when it began."""
    given = dict(given)
    notes: list[str] = []
    algorithm = _algorithm(given, notes)
    dataset = _dataset(given)
    ours = options_of(dataset.options).keys() | options_of(algorithm.options).keys()
    for name, reason in {**RETIRED, **algorithm.unread}.items():
        if name not in ours and given.pop(name, None) is not None:
            notes.append(f"--{name} has no effect: {reason}.")
    seeds = _seeds(given)
    as_published = _yes(given, "as_published")
    _device(given, notes)
    if _yes(given, "xav_init"):
        given.setdefault("init", "xavier_normal")

    groups = {"run": RunOptions, "network": NetworkOptions, "stream": dataset.options, "learner": algorithm.options}
    known = {name: o for cls in groups.values() for name, o in options_of(cls).items()}
    _refuse_foreign(given, known, algorithm, dataset)

    n_epochs = known["n_epochs"].parse(given["n_epochs"]) if "n_epochs" in given else None
    row = papers.default_row(algorithm.name, dataset.name, n_epochs)
    if not seeds:
        seeds = row.seeds if row else (0, 1, 2, 3, 4)
    layers = [(f"default of {algorithm.name}", algorithm.presets), (f"default of {dataset.name}", dataset.presets)]
    layers += [(row.file, row.settings)] if row else []
    if as_published:
        layers += [("--as_published", algorithm.deviations(dataset.images))]
    if given.get("pretrained") and not begun:
        saved = saved_network.settings(given["pretrained"], seeds, algorithm.name, known, given)
        layers += [(f"--pretrained {given['pretrained']}", saved)]
    layers += [("command line", given)]
    values = {name: o.default for name, o in known.items()}
    sources = dict.fromkeys(known, "default")
    for source, settings in layers:
        for name, value in settings.items():
            values[name], sources[name] = known[name].parse(value), source

    parts = {group: cls(**{name: values[name] for name in options_of(cls)}) for group, cls in groups.items()}
    config = Config(algorithm, dataset, seeds, as_published, **parts, sources=sources, notes=tuple(notes))
    _check(config)
    network = ""
    if config.run.pretrained and not begun:
        network = saved_network.digest(config.run.pretrained, seeds)
    return dataclasses.replace(config, resume_auto=auto, pretrained_sha256=network)


def _resumed(folder: Path, given: dict) -> Config:
    """The configuration of the run in a folder, as it was then, but for what `given` says of MAY_CHANGE."""
    folder, told = parameters.read(folder)
    if unknown := set(told["options"]) - set(_known_options()):
        raise UserError(
            f"--resume {folder} was written by another version, which had --{sorted(unknown)[0]}: start the run anew."
        )
    begun = {
        "model": told["model"],
        "dataset": told["dataset"],
        "seeds": [str(seed) for seed in told["seeds"]],
        "as_published": "yes" if told["as_published"] else "no",
        **told["options"],
    }
    names = {"model", "dataset", "data_file", "seed", "seeds"}
    asked = {name: value for name, value in given.items() if name in names}
    _refuse_other(folder, resolve({**asked, "device": "cpu"}).names() if asked else {}, told, asked)
    given = {name: value for name, value in given.items() if name not in asked}
    kept = {name: value for name, value in begun.items() if name != ("device" if "cuda" in given else None)}
    config = _resolve({**kept, **given}, begun=True)
    former = _resolve({name: value for name, value in begun.items() if name not in MAY_CHANGE}, begun=True)
    now, before = ({**c.values, "as_published": c.as_published} for c in (config, former))
    changed = {name: value for name, value in now.items() if name not in MAY_CHANGE and value != before[name]}
    _refuse_other(folder, changed, before, changed)
    origin = {"sources": told.get("sources", config.sources), "pretrained_sha256": told.get("pretrained_sha256", "")}
    return dataclasses.replace(config, resume=folder, **origin)


def _refuse_other(folder: Path, now: dict, before: dict, asked: dict) -> None:
    """UserError if what is asked for is not what the run in the folder began with."""
    spelt = {"data_file": "dataset", "seed": "seeds"}
    for flag in asked:
        name = spelt.get(flag, flag)
        if now[name] != before[name]:
            raise UserError(
                f"--resume {folder} began with --{name} {before[name]}, not {now[name]}: drop it to go on with that"
                " run, or drop --resume to start a new one."
            )


def _algorithm(given: dict, notes: list[str]) -> Algorithm:
    typed = given.pop("model", "lamaml")
    name = typed.replace("-", "_")
    name = ALIASES.get(name, name)
    if name not in ALGORITHMS:
        raise UserError(f"--model {typed} is not known: {nearest(typed, [*ALGORITHMS, *ALIASES])}.")
    if name == "er" and "learn_lr" in given and _yes(given, "learn_lr"):
        name = "la_er"  # as La-MAML's eralg4
        notes.append(f"--learn_lr makes --model {typed} the algorithm la_er.")
    algorithm = ALGORITHMS[name]
    switches = ("learn_lr", "sync_update")
    if any(switch in given for switch in switches) and "learn_lr" in algorithm.presets:
        # As in La-MAML's scripts: once a switch is given, both mean what they say, and absent means off.
        wanted = {switch: options_of(algorithm.options)[switch].parse(given.pop(switch, "no")) for switch in switches}
        algorithm = variant_of(algorithm, **wanted)
        if algorithm.presets != wanted:
            given.update({switch: str(value) for switch, value in wanted.items()})
        elif algorithm.name != name:
            notes.append(f"--learn_lr and --sync_update as given make --model {typed} the algorithm {algorithm.name}.")
    return algorithm


def _dataset(given: dict) -> Dataset:
    file = given.pop("data_file", None)
    name = given.pop("dataset", None)
    if file is not None and name is not None:
        raise UserError(f"--dataset {name} and --data_file {file} both name the stream: give one of them.")
    typed = Path(file).stem if file is not None else "digits_rotations" if name is None else name
    if typed not in DATASETS:
        flag = "dataset" if file is None else "data_file"
        raise UserError(f"--{flag} {typed} is not known: {nearest(typed, DATASETS)}.")
    return DATASETS[typed]


def _seeds(given: dict) -> tuple[int, ...]:
    """Those that are given; none if none is."""
    one, several = given.pop("seed", None), given.pop("seeds", None)
    if one is not None and several is not None:
        raise UserError(f"--seed {one} and --seeds {' '.join(several)} exclude each other: give one of them.")
    checker = Option("seeds" if several else "seed", int, 0, low=0, high=2**63 - 1)
    seeds = tuple(checker.parse(text) for text in several or ([] if one is None else [one]))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(several)} names a seed twice: every replica needs its own.")
    return seeds


def _yes(given: dict, name: str) -> bool:
    return Option(name, bool, False).parse(given.pop(name, "no"))


def _device(given: dict, notes: list[str]) -> None:
    cuda = given.pop("cuda", None)
    if cuda is not None and "device" not in given:
        wanted = Option("cuda", bool, False).parse(cuda)
        if wanted and not torch.cuda.is_available():
            notes.append("--cuda was asked for, but this machine offers no CUDA device: running on the CPU.")
        given["device"] = "cuda" if wanted and torch.cuda.is_available() else "cpu"
    check_device(given.get("device", "cpu"))


def _refuse_foreign(given: dict, known: dict, algorithm: Algorithm, dataset: Dataset) -> None:
    for name in given:
        if name in known:
            continue
        owners = [a.name for a in ALGORITHMS.values() if name in options_of(a.options)]
        if owners:
            raise UserError(
                f"--{name} is an option of {', '.join(owners)}, not of {algorithm.name}: drop it, or change --model."
            )
        owners = [d.name for d in DATASETS.values() if name in options_of(d.options)]
        raise UserError(
            f"--{name} is an option of {', '.join(owners)}, not of {dataset.name}: drop it, or change --dataset."
        )


def _check(config: Config) -> None:
    """Combinations that cannot work, in whole sentences."""
    run = config.run
    for name, folder in (("log_dir", run.log_dir), ("data_path", run.data_path)):
        if not folder or "\0" in folder:
            raise UserError(f"--{name} {folder!r} names no folder: give a path, such as {name.partition('_')[0]}.")
    if not re.fullmatch(r"[\w.,=+-]{1,100}", run.expt_name) or run.expt_name.startswith("."):
        raise UserError(
            f"--expt_name {run.expt_name!r} cannot be part of a folder's name: give letters, digits, - and _."
        )
    config.dataset.check(config.stream, run.data_path)
    config.network.check(config.dataset.images)
    if run.evaluate_on == "validation" and not config.stream.validation:
        raise UserError(
            "--evaluate_on validation needs validation data: give --validation 0.1 (a fraction of the training data)."
        )
    if run.log_alignment and not (config.algorithm.learner.replays and getattr(config.learner, "replays", True)):
        raise UserError(
            f"--log_alignment compares with replayed examples, and {config.algorithm.name} replays none here: drop it,"
            " or choose --model er."
        )
    if config.algorithm.needs_task and not config.dataset.gives_task:
        raise UserError(
            f"--model {config.algorithm.name} has weights of its own for every task, and {config.dataset.name} does not"
            " tell the task: choose another --model, such as er, or another --dataset."
        )
    if config.algorithm.needs_task and getattr(config.stream, "scenario", "task") == "class":
        raise UserError(
            f"--model {config.algorithm.name} has weights of its own for every task, and --scenario class does not tell"
            " the task: choose another --model, such as er, or --scenario task."
        )
    if run.evaluate_on == "validation" and config.dataset.meta_trains:
        raise UserError(
            f"--evaluate_on validation is not for {config.dataset.name}, which keeps whole classes apart: give"
            " --trajectory validation."
        )
    if getattr(config.learner, "meta_iterations", 0) and not config.dataset.meta_trains:
        raise UserError(
            f"--meta_iterations {config.learner.meta_iterations} needs classes to meta-train on, and"
            f" {config.dataset.name} has none: choose --dataset omniglot, or drop it."
        )
    if hasattr(config.learner, "check"):
        classes = config.dataset.n_classes
        if hasattr(config.stream, "classes_of"):
            classes = config.stream.classes_of(classes)
        config.learner.check(config.algorithm.name, run.batch_size, classes)


# ---------------------------------------------------------------- what the user can read


def help_text() -> str:
    """--help: common options, then one group per stream family and per algorithm family."""
    lines = ["usage: main.py [--model NAME] [--dataset NAME] [--seeds N ...] [options]", "", DESCRIPTION, ""]
    lines += ["what to run:", *(f"  --{name}\n      {text}" for name, text in {**SPECIAL, **ACTIONS}.items()), ""]
    lines += ["the run:", *(flag_line(o, o.default) for o in options_of(RunOptions).values()), ""]
    lines += ["the network:", *(flag_line(o, o.default) for o in options_of(NetworkOptions).values()), ""]
    for title, entries in (("stream", DATASETS), ("algorithm", ALGORITHMS)):
        families: dict[type, list] = {}
        for entry in entries.values():
            families.setdefault(entry.options, []).append(entry)
        for cls, members in families.items():
            lines += [f"{title} {', '.join(m.name for m in members)}:"]
            for o in options_of(cls).values():
                per_member = {m.presets.get(o.name, o.default) for m in members}
                default = per_member.pop() if len(per_member) == 1 else "depends on the name"
                lines.append(flag_line(o, default))
            lines.append("")
    lines.append("A row of papers/ for the algorithm and the stream replaces these defaults: see --show_config.")
    return "\n".join(lines)


def list_text() -> str:
    """--list: names, summaries, citations."""
    lines = ["algorithms (--model):"]
    for a in ALGORITHMS.values():
        older = f"; also called {', '.join(a.aliases)}" if a.aliases else ""
        lines.append(f"  {a.name:24} {a.summary}{older}\n  {'':24} {a.citation}")
    lines += ["", "streams (--dataset):"]
    lines += [f"  {d.name:24} {d.summary}\n  {'':24} {d.citation}" for d in DATASETS.values()]
    return "\n".join(lines)


def config_text(config: Config) -> str:
    """--show_config: every value and its source."""
    rows = [("model", config.algorithm.name, ""), ("dataset", config.dataset.name, "")]
    rows += [("seeds", " ".join(map(str, config.seeds)), ""), ("as_published", config.as_published, "")]
    rows += [(name, value, config.sources[name]) for name, value in config.values.items()]
    widths = [max(len(str(row[i])) for row in rows) for i in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {value!s:{widths[1]}}  {source}".rstrip() for name, value, source in rows)
