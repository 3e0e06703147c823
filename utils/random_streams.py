"""Named, independent streams of random numbers, one of each name per replica.

A draw in one stream never shifts another, and replica r draws exactly what a run of its seed alone draws, on every
device: all draws are made on the host by NumPy.
"""

import zlib

import numpy as np


def generator(seed: int, name: str, *index: int) -> np.random.Generator:
    """The generator that belongs to (seed, name, index), whatever was drawn before.

    Args:
        seed: the replica's seed, at least 0.
        name: what the numbers are for, such as "initial weights" or "data order".
        index: further coordinates, such as (task, epoch).
    """
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode()), *index]))


class RandomStreams:
    """The stateful streams a learner owns: `streams["replay"]` is a list of one generator per replica.

    The state is saved and restored whole, so a resumed run continues with the very next draw.
    """

    def __init__(self, seeds):
        self.seeds = tuple(seeds)
        self._streams: dict[str, list[np.random.Generator]] = {}

    def __getitem__(self, name: str) -> list[np.random.Generator]:
        if name not in self._streams:
            self._streams[name] = [generator(seed, name) for seed in self.seeds]
        return self._streams[name]

    def state_dict(self) -> dict:
        return {name: [rng.bit_generator.state for rng in rngs] for name, rngs in self._streams.items()}

    def load_state_dict(self, state: dict) -> None:
        self._streams.clear()
        for name, states in state.items():
            for rng, saved in zip(self[name], states, strict=True):
                rng.bit_generator.state = saved
