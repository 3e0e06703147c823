"""training_parameters.json: what a run was told, and what it ran on."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from utils.errors import UserError

if TYPE_CHECKING:
    from utils.config import Config

ROOT = Path(__file__).parent.parent
NAME = "training_parameters.json"
NEEDED = {"model": str, "dataset": str, "data": str, "data_sha256": str, "seeds": list, "as_published": bool}
NEEDED |= {"options": dict, "versions": dict}


def describe(config: "Config", data_sha256: str | None = None) -> dict:
    """What the file of every seed says, but for the seed. data_sha256: Stream.fingerprint, where it is known."""
    on_gpu = config.run.device != "cpu"
    return {
        "model": config.algorithm.name,
        "dataset": config.dataset.name,
        "data": config.dataset.origin(config.run.data_path),
        "data_sha256": data_sha256,
        "pretrained_sha256": config.pretrained_sha256,
        "seeds": list(config.seeds),
        "as_published": config.as_published,
        "options": config.values,
        "sources": config.sources,
        "command": sys.argv,
        "versions": versions(),
        "commit": commit(),
        "machine": {
            "device": torch.cuda.get_device_name(config.run.device) if on_gpu else platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }


def read(folder: Path) -> tuple[Path, dict]:
    """The folder of a run (given the folder of one of its seeds, too), and what its files say, but for the seed.

    UserError if there is none that can be read.
    """
    try:
        if os.path.exists(folder / NAME):
            folder = folder.resolve().parent
        found = sorted(folder.glob(f"*/{NAME}"))
        if not found:
            raise ValueError(f"no folder in it has {NAME}")
        content = json.loads(found[0].read_text())
        if not isinstance(content, dict):
            raise ValueError(f"{found[0]} holds no options")
        if wrong := [name for name, kind in NEEDED.items() if not isinstance(content.get(name), kind)]:
            raise ValueError(f"{found[0]} has no sound {wrong[0]}; versions of before 2026-11-21 cannot be resumed")
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {folder} is no record of a run ({error}): give the folder of one.") from None
    return folder, {name: value for name, value in content.items() if name != "seed"}


def changes(begun: dict) -> list[str]:
    """What is different now from when a run began, and may change its numbers; one sentence each."""
    pairs = [("commit", begun.get("commit"), commit())]
    pairs += [(name, begun["versions"].get(name), version) for name, version in versions().items()]
    return [
        f"the run began with {name} {former} and goes on with {now}: its numbers may differ from those of one piece."
        for name, former, now in pairs
        if former != now
    ]


def versions() -> dict:
    """Of what the numbers of a run may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def commit() -> str | None:
    """The commit of this code, with "+" where it was changed since; None outside a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + ("+" if changed else "")
