"""network.pt: a network as meta-training left it, as plain tensors with their options, to start other runs from.

    {"format": 1, "model": "anml", "options": {option: value, …}, "weights": {name: tensor, …}}

`torch.load(path, weights_only=True)` reads it.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from model.registry import ALGORITHMS
from utils import tensors
from utils.errors import UserError

NAME = "network.pt"
FORMAT = 1

#: Options that a run takes over from the network that it starts from: what shapes the network and what it sees; and
#: what decides which classes it never saw.
SHAPING = ("arch", "n_hiddens", "n_layers", "channels", "gate", "gate_width", "image_size")
TAKEN_OVER = (*SHAPING, "validation", "stream_seed")


def save(folder: Path, model: str, options: dict, weights: dict[str, Tensor]) -> None:
    """Writes network.pt into a folder. weights: name -> tensor, of one replica."""
    content = {"format": FORMAT, "model": model, "options": options}
    tensors.save(folder / NAME, {**content, "weights": {name: value.cpu().clone() for name, value in weights.items()}})


def load(path: Path, flag: str = "--pretrained") -> dict:
    """What the file holds. flag: that named it. UserError, in a sentence, if it is none of these."""
    try:
        content = tensors.load(path, map_location="cpu")
        if not isinstance(content, dict) or not isinstance(content.get("options"), dict) or "weights" not in content:
            raise ValueError("it has no options and weights")
        if content.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}, which this version reads")
        if content.get("model") not in ALGORITHMS:
            raise ValueError(f"its model {str(content.get('model'))[:40]!r} is not known")
        weights = content["weights"]
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("its weights are no tensors with names")
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise ValueError("its weights are not all finite numbers: its meta-training diverged")
    except (OSError, ValueError) as error:
        reason = error if path.exists() else "there is no such file"
        raise UserError(
            f"{flag} {path} is no saved network ({reason}): give the {NAME} of a run that meta-trained one."
        ) from None
    return content


def paths(pretrained: str, seeds) -> list[Path]:
    """The file of each seed: the one that is given, or that of the seed in a folder of a run."""
    path = Path(pretrained)
    if not path.is_dir():
        return [path] * len(seeds)
    if (path / NAME).exists():
        return [path / NAME] * len(seeds)
    return [path / str(seed) / NAME for seed in seeds]


def settings(pretrained: str, seeds, known, given: dict) -> dict:
    """The settings that a run takes over from what it starts from.

    known: names of the run's options. given: those of the command line. UserError if the two disagree.
    """
    files = {path: load(path)["options"] for path in dict.fromkeys(paths(pretrained, seeds))}
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


def put_into(learner, pretrained: str) -> None:
    """Gives a learner's replicas the saved weights. UserError if they are those of another network."""
    layout = learner.network.layout
    files = paths(pretrained, learner.seeds)
    for path in dict.fromkeys(files):
        found = load(path)["weights"]
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        if shapes != {name: tuple(shape) for name, shape in layout.shapes.items()}:
            odd = next(iter(set(shapes.items()) ^ set(layout.shapes.items())))
            raise UserError(
                f"--pretrained {path} holds another network than the options describe ({odd[0]} {odd[1]} is in only one"
                " of them): give its --model, and drop the options that shape a network."
            )
        flat = torch.cat([found[name].flatten() for name in layout.shapes])
        learner.weights[[row for row, file in enumerate(files) if file == path]] = flat.to(learner.weights)
