"""Every algorithm by name: what it is called, what builds it, what it takes, and where it comes from."""

import dataclasses
from collections.abc import Callable

from model.er import ER, EROptions, ERTasks
from model.ewc import EWC, EWCOptions
from model.gem import AGEM, GEM, AGEMOptions, GEMOptions
from model.icarl import ICaRL, ICaRLOptions
from model.la_er import LaER, LaEROptions
from model.learner import Learner
from model.lookahead import LookaheadMAML, LookaheadOptions
from model.mer import MER, MERAlg6, MERAlg6Options, MERAlg7, MERAlg7Options, MEROptions
from model.meta_bgd import MetaBGD, MetaBGDOptions
from model.oml import OML, OMLOptions, oml_network
from model.online import Online, OnlineOptions
from model.per_task import (
    Independent,
    IndependentOptions,
    TaskInput,
    TaskInputOptions,
    independent_network,
    taskinput_network,
)

LA_MAML = "Gupta, Yadav, Paull 2020, La-MAML: Look-ahead Meta Learning for Continual Learning (arXiv 2007.13904)"
RIEMER = (
    "Riemer et al. 2019, Learning to Learn without Forgetting by Maximizing Transfer and Minimizing Interference"
    " (arXiv 1810.11910)"
)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One row of the registry.

    learner, options: the classes. presets: defaults of this algorithm where they differ from the options class.
    as_published: what --as_published sets, each an ordinary option that undoes one correction of ours;
    as_published_images: the same where the published program differs on streams of images.
    joint: trained on all tasks mixed instead of one after the other. needs_task: learns only if it is told the task.
    network: (the network of NetworkOptions, number of tasks, options) -> the one it learns. aliases: older names.
    unread: flags of published command lines for it that change nothing, and why; noted and ignored.
    """

    name: str
    learner: type[Learner]
    options: type
    summary: str
    citation: str
    presets: dict = dataclasses.field(default_factory=dict)
    as_published: dict = dataclasses.field(default_factory=dict)
    as_published_images: dict = dataclasses.field(default_factory=dict)
    joint: bool = False
    needs_task: bool = False
    network: Callable = lambda network, n_tasks, options=None: network
    aliases: tuple[str, ...] = ()
    unread: dict[str, str] = dataclasses.field(default_factory=dict)

    def deviations(self, images: bool) -> dict:
        """What --as_published sets, on streams of images or on others."""
        return {**self.as_published, **(self.as_published_images if images else {})}


_REPLAY_2020 = {"reservoir": "inclusive", "replacement": True}
_EPOCH_REPLAY_2020 = {**_REPLAY_2020, "remember": "every_epoch"}
_LOOKAHEAD_2020 = {**_REPLAY_2020, "inner_clip": False, "snapshot": "live"}
_LOOKAHEAD_IMAGES_2020 = {"inner_clip": True, "inner_rates": "raw", "snapshot": "copy"}


def _lookahead(name: str, summary: str, learn_lr: bool, sync_update: bool, aliases=()) -> Algorithm:
    presets = {"learn_lr": learn_lr, "sync_update": sync_update}
    classes = LookaheadMAML, LookaheadOptions
    as_published = _LOOKAHEAD_2020, _LOOKAHEAD_IMAGES_2020
    return Algorithm(name, *classes, summary, LA_MAML, presets, *as_published, aliases=aliases)


ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        _lookahead(
            "lamaml",
            "La-MAML: look-ahead meta-learning with learned per-parameter rates",
            True,
            False,
            ("lamaml_cifar",),
        ),
        _lookahead("sync", "Sync La-MAML: learns the rates, but steps the weights with a fixed one", True, True),
        _lookahead("cmaml", "C-MAML: the same objective with fixed rates in both loops", False, True),
        Algorithm(
            "oml",
            OML,
            OMLOptions,
            "OML: meta-learns features under which the output layer learns class after class",
            "Javed and White 2019, Meta-Learning Representations for Continual Learning (arXiv 1905.12588)",
            network=oml_network,
        ),
        Algorithm(
            "anml",
            OML,
            OMLOptions,
            "ANML: the same with a neuromodulatory network that gates the features",
            "Beaulieu et al. 2020, Learning to Continually Learn (arXiv 2002.09571)",
            presets={"scope": "prediction", "gate": True},
            as_published={"second_order": False},
            network=oml_network,
        ),
        Algorithm(
            "er",
            ER,
            EROptions,
            "experience replay from a reservoir",
            RIEMER + ", Algorithm 4",
            as_published=_EPOCH_REPLAY_2020,
            aliases=("eralg4",),
        ),
        Algorithm(
            "er_tasks",
            ERTasks,
            EROptions,
            "experience replay whose loss gives every task in the batch the same weight",
            RIEMER + ", Algorithm 5",
            as_published=_EPOCH_REPLAY_2020,
            aliases=("eralg5",),
        ),
        Algorithm(
            "la_er",
            LaER,
            LaEROptions,
            "La-ER: experience replay with per-parameter rates learned by looking ahead",
            LA_MAML,
            as_published={**_EPOCH_REPLAY_2020, "inner_rates": "raw"},
        ),
        Algorithm(
            "meta_bgd",
            MetaBGD,
            MetaBGDOptions,
            "C-MAML's objective minimised by Bayesian gradient descent",
            LA_MAML + "; Zeno et al. 2018, Task Agnostic Continual Learning Using Online Variational Bayes",
            as_published={
                **_REPLAY_2020,
                "bgd_scale": "incoming",
                "sample_rates": True,
                "inner_rates": "raw",
                "snapshot": "live",
            },
        ),
        Algorithm(
            "mer",
            MER,
            MEROptions,
            "meta-experience replay: Reptile within and across batches of single-example steps",
            RIEMER + ", Algorithm 1",
            as_published=_EPOCH_REPLAY_2020,
            aliases=("meralg1",),
        ),
        Algorithm(
            "mer_alg6",
            MERAlg6,
            MERAlg6Options,
            "meta-experience replay with one Reptile step, the incoming example last",
            RIEMER + ", Algorithm 6",
            presets={"gamma": 0.1},
            as_published=_EPOCH_REPLAY_2020,
            aliases=("meralg6",),
        ),
        Algorithm(
            "mer_alg7",
            MERAlg7,
            MERAlg7Options,
            "meta-experience replay with one Reptile step, a larger rate for the incoming example",
            RIEMER + ", Algorithm 7",
            presets={"gamma": 0.1},
            as_published=_EPOCH_REPLAY_2020,
            aliases=("meralg7",),
        ),
        Algorithm(
            "gem",
            GEM,
            GEMOptions,
            "gradient episodic memory: steps that raise the loss of no old task",
            "Lopez-Paz and Ranzato 2017, Gradient Episodic Memory for Continual Learning (arXiv 1706.08840)",
            as_published={"ridge": "absolute"},
        ),
        Algorithm(
            "agem",
            AGEM,
            AGEMOptions,
            "averaged GEM: steps that do not raise the loss on a random batch of the memory",
            "Chaudhry et al. 2019, Efficient Lifelong Learning with A-GEM (arXiv 1812.00420)",
            as_published={"reference": "task_mean", "protect_first_task": False, "grad_clip_norm": 2.0},
            unread={"memory_strength": "A-GEM has no margin, and the published code never used it"},
        ),
        Algorithm(
            "ewc",
            EWC,
            EWCOptions,
            "elastic weight consolidation: weights that mattered are held where they were",
            "Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks (arXiv 1612.00796)",
            as_published={"fisher": "square_of_mean", "keep": "first"},
        ),
        Algorithm(
            "icarl",
            ICaRL,
            ICaRLOptions,
            "iCaRL: nearest mean of exemplars in a feature space kept by distillation",
            "Rebuffi et al. 2017, iCaRL: Incremental Classifier and Representation Learning (arXiv 1611.07725)",
            as_published={"features": "logits"},
        ),
        Algorithm(
            "independent",
            Independent,
            IndependentOptions,
            "a small network of its own for every task",
            RIEMER,
            needs_task=True,
            network=independent_network,
        ),
        Algorithm(
            "taskinput",
            TaskInput,
            TaskInputOptions,
            "one network with an input layer of its own for every task",
            RIEMER,
            needs_task=True,
            network=taskinput_network,
        ),
        Algorithm(
            "online", Online, OnlineOptions, "SGD on each batch as it comes: the floor", RIEMER, aliases=("single",)
        ),
        Algorithm(
            "iid",
            Online,
            OnlineOptions,
            "SGD on batches mixed over all tasks: the ceiling",
            LA_MAML,
            joint=True,
            aliases=("iid2",),
        ),
    )
}

ALIASES: dict[str, str] = {alias: algorithm.name for algorithm in ALGORITHMS.values() for alias in algorithm.aliases}


def variant_of(algorithm: Algorithm, learn_lr: bool, sync_update: bool) -> Algorithm:
    """The named look-ahead algorithm with these two switches; `algorithm` itself where no name fits."""
    wanted = {"learn_lr": learn_lr, "sync_update": sync_update}
    return next((a for a in ALGORITHMS.values() if a.learner is LookaheadMAML and a.presets == wanted), algorithm)
