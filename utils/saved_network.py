"""network.pt: a network as meta-training left it, as plain tensors with their options, to start other runs from.

    {"format": 1, "model": "anml", "options": {option: value, …}, "weights": {name: tensor, …}}

`torch.load(path, weights_only=True)` reads it.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from dataloaders.trajectories import TrajectoryOptions
from model.networks import NetworkOptions
from model.oml import OMLOptions
from model.registry import ALGORITHMS
from utils import tensors
from utils.errors import UserError
from utils.options import options_of

NAME = "network.pt"
FORMAT = 1
PRETRAINED = "--pretrained"

#: Options that a run takes over from the network that it starts from: what shapes the network and what it sees; and
#: what decides which classes it never saw.
SHAPING = ("arch", "n_hiddens", "n_layers", "channels", "gate", "gate_width", "image_size")
TAKEN_OVER = (*SHAPING, "validation", "stream_seed")

#: The algorithms that leave such files, and their options.
META_TRAINING = [name for name, a in ALGORITHMS.items() if "meta_iterations" in options_of(a.options)]
KNOWN = {**options_of(NetworkOptions), **options_of(TrajectoryOptions), **options_of(OMLOptions)}


def save(folder: Path, model: str, options: dict, weights: dict[str, Tensor]) -> None:
    """Writes network.pt into a folder. weights: name -> tensor, of one replica."""
    content = {"format": FORMAT, "model": model, "options": options}
    tensors.save(folder / NAME, {**content, "weights": {name: value.cpu().clone() for name, value in weights.items()}})


def load(path: Path, flag: str = PRETRAINED) -> dict:
    """What the file holds, its options checked. flag: that named it. UserError if it is no such file."""
    try:
        content = tensors.load(path, map_location="cpu")
        if not isinstance(content, dict) or not isinstance(content.get("options"), dict) or "weights" not in content:
            raise ValueError("it has no options and weights")
        if content.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}, which this version reads")
        if str(content.get("model")) not in META_TRAINING:
            raise ValueError(f"its model {str(content.get('model'))[:40]!r} is none that meta-trains")
        for name in TAKEN_OVER:
            if name not in content["options"]:
                raise ValueError(f"it does not say its {name}")
            KNOWN[name].parse(content["options"][name])
        weights = content["weights"]
        if not isinstance(weights, dict) or not all(map(_is_numbers, weights.values())):
            raise ValueError("its weights are no tensors of floating-point numbers with names")
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise ValueError("its weights are not all finite numbers: its meta-training diverged")
    except (OSError, ValueError, UserError) as error:
        reason = str(error).removesuffix(".") if path.exists() else "there is no such file"
        raise UserError(
            f"{flag} {path} is no saved network ({reason}): give the {NAME} of a run that meta-trained one."
        ) from None
    return content


def _is_numbers(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def paths(pretrained: str, seeds) -> list[Path]:
    """The file of each seed: the one that is given, or that of the seed in a folder of a run."""
    path = Path(pretrained)
    if not path.is_dir():
        return [path] * len(seeds)
    if (path / NAME).exists():
        return [path / NAME] * len(seeds)
    return [path / str(seed) / NAME for seed in seeds]


def settings(pretrained: str, seeds, model: str, known, given: dict) -> dict:
    """The settings that a run takes over from what it starts from.

    model: the run's algorithm. known: names of its options. given: those of the command line. UserError if the file
    disagrees with them.
    """
    contents = {path: load(path) for path in dict.fromkeys(paths(pretrained, seeds))}
    for path, content in contents.items():
        if model in META_TRAINING and content["model"] != model:
            raise UserError(
                f"--model {model} disagrees with --pretrained {path}, which holds a network of {content['model']}: give"
                f" --model {content['model']}."
            )
    files = {path: content["options"] for path, content in contents.items()}
    taken = {name: value for name, value in next(iter(files.values())).items() if name in TAKEN_OVER and name in known}
    for path, options in files.items():
        for name, value in taken.items():
            if options.get(name) != value:
                raise UserError(f"--pretrained {pretrained} mixes networks: {path} has --{name} {options.get(name)}.")
    for name, value in taken.items():
        if name in given and known[name].parse(given[name]) != value:
            raise UserError(
                f"--{name} {given[name]} disagrees with --pretrained {pretrained}, which has {value}: drop --{name}, or"
                " give another network."
            )
    return {"meta_iterations": 0, **taken} if "meta_iterations" in known else taken


def digest(pretrained: str, seeds) -> str:
    """Of the files that the seeds start from, so that a run is never taken for one that began with others."""
    both = hashlib.sha256()
    for path in paths(pretrained, seeds):
        both.update(path.read_bytes())
    return both.hexdigest()


def put_into(learner, pretrained: str, flag: str = PRETRAINED) -> None:
    """Gives a learner's replicas the saved weights. UserError if they are those of another network."""
    layout = learner.network.layout
    files = paths(pretrained, learner.seeds)
    for path in dict.fromkeys(files):
        found = load(path, flag)["weights"]
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        if shapes != {name: tuple(shape) for name, shape in layout.shapes.items()}:
            odd = next(iter(set(shapes.items()) ^ set(layout.shapes.items())))
            raise UserError(
                f"{flag} {path} holds another network than the options describe ({odd[0]} {odd[1]} is in only one"
                " of them): give its --model, and drop the options that shape a network."
            )
        flat = torch.cat([found[name].flatten() for name in layout.shapes])
        learner.weights[[row for row, file in enumerate(files) if file == path]] = flat.to(learner.weights)
