"""OML and ANML: meta-learn what makes later learning of many classes, one after the other, forget little.

Javed and White, "Meta-Learning Representations for Continual Learning", NeurIPS 2019; Beaulieu et al., "Learning to
Continually Learn", ECAI 2020. One learner with settings: what the inner loop changes, whether a neuromodulatory network
gates the features, which weights of the output layer are drawn anew ("zapped").
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from model.adam import Adam
from model.batch import Batch
from model.episodes import EpisodeOptions, draw_episode, meta_gradient
from model.finetune import head_loss_and_gradient, scope_loss_and_gradient
from model.lookahead import LookaheadMAML, LookaheadOptions
from model.networks.modulated import modulated
from model.statistics_heads import StatisticsHead
from utils.errors import UserError
from utils.options import option


@dataclasses.dataclass(frozen=True)
class OMLOptions(EpisodeOptions, LookaheadOptions):
    learn_lr: bool = option(False, "learn the per-parameter rates alpha (online only)")
    sync_update: bool = option(True, "step the weights with the fixed rate --opt_wt instead of the rates alpha")
    alpha_init: float = option(
        0.1, "rate of the inner loop, the same for every parameter at first", above=0, flags=("update_lr", "inner_lr")
    )
    scope: Literal["head", "prediction", "all"] = option(
        "head", "what the inner loop changes: the output layer, all but the gate, or everything"
    )
    gate: bool = option(False, "a neuromodulatory network multiplies the features by numbers between 0 and 1")
    gate_width: float = option(
        0.4375, "channels or hidden units of the gate's network, as a fraction of the other's", above=0, high=10
    )
    gate_bias: float = option(0.0, "initial bias of the gate's outputs: at 0 gates start half open, at 2 nearly open")
    gate_lr: float = option(0.01, "online: learning rate of the gate's weights where they are outside the scope", low=0)
    zap: Literal["none", "row", "head"] = option(
        "row",
        "weights of the output layer that are drawn anew: row is those of a class before an episode learns it (online:"
        " when it is first met), head is all of them before every episode",
    )
    online: Literal["lookahead", "finetune"] = option(
        "lookahead",
        "how the stream is learnt: lookahead is C-MAML's meta-update with its replay memory; finetune is one step of"
        " Adam on each batch, without any memory, as OML and ANML are tested",
    )
    finetune_scope: Literal["head", "prediction", "all"] = option(
        "head", "what --online finetune changes; the rest stays as meta-training left it"
    )
    finetune_lr: float = option(0.001, "learning rate of --online finetune", above=0)
    reset_head: bool = option(True, "--online finetune begins with an output layer that is drawn anew")
    head: Literal["linear", "prototype", "gaussian"] = option(
        "linear",
        "how the stream's classes are told apart: by the linear output layer, or without any gradient step by the"
        " nearest mean of a class's features, or by the likeliest of a Gaussian per class (its Bayesian predictive)",
    )
    prior_strength: float = option(
        10.0, "gaussian: examples that the variance common to all classes counts for in that of each", above=0
    )

    @property
    def replays(self) -> bool:
        """Whether the stream's examples are replayed."""
        return self.head == "linear" and self.online == "lookahead"

    def check(self, model: str, batch_size: int, classes: int) -> None:
        super().check(model, batch_size, classes)
        if self.fresh and self.episode_images > 10:
            raise UserError(
                f"--episode_images {self.episode_images} of a class's 20 leave too few others for --fresh: give at most"
                " 10, or --fresh no."
            )


def oml_network(network, n_tasks: int, options: OMLOptions):
    """The network, with a gate if there is to be one."""
    return modulated(network, options.gate_width, options.gate_bias) if options.gate else network


class OML(LookaheadMAML):
    """Meta-training, then one of three ways to learn a stream.

    Meta-training (`pretrain`), with l cross-entropy over all outputs:

        zap;  phi_0 = theta;  phi_k = phi_{k-1} - alpha_init * grad l(phi_{k-1}; image k of the episode), in the scope
        theta <- Adam(theta, grad of l(phi_K; outer images of the episode))

    OML: scope head, other images of the same classes and random ones outside. ANML: scope prediction, gate, the images
    just learnt and random ones outside; first order is its published code, --second_order its paper. Row zaps change
    the stored weights, as the published code does (the paper's text zaps a copy).

    The stream (`observe`): --online finetune, OML's and ANML's meta-test; --head prototype or gaussian, which only
    count; or --online lookahead, C-MAML's meta-update whose inner loop stays in the scope, the gate, outside of
    it, being slow: it follows the meta-loss at --gate_lr. Without gate and zap and with scope all
    that is C-MAML, number for number.
    """

    state = (*LookaheadMAML.state, "outer", "fine", "known")

    def __init__(self, network, options: OMLOptions, seeds, **where):
        super().__init__(network, options, seeds, **where)
        self.outer, self.fine = Adam(), Adam()
        self.known = torch.zeros(len(self.seeds), network.classes, dtype=torch.bool, device=self.weights.device)
        self.rates[:, : network.first_column(options.scope)] = 0
        self.statistics_head = None
        if options.head != "linear":
            self.statistics_head = StatisticsHead(options.head, options.prior_strength)
            self.state = (*self.state, "statistics_head")
        if not options.learn_lr:  # rates are then what they were
            self.state = tuple(name for name in self.state if name != "rates")

    # ------------------------------------------------------------ meta-training

    @property
    def pretraining_steps(self) -> int:
        return self.options.meta_iterations

    def pretrain(self, stream, step: int) -> Tensor:
        o = self.options
        episode = draw_episode(stream.background, self.random["episodes"], o, stream.to_float)
        if o.zap == "row":
            self._redraw([classes.unique() for classes in episode.y[:, : episode.inner]])
        elif o.zap == "head":
            self._redraw_head()
        loss, gradient = meta_gradient(self.network, self.weights, episode, o.alpha_init, o.scope, o.second_order)
        self.outer.step_(self.weights, gradient, o.meta_lr)
        if step + 1 == o.meta_iterations:
            self.outer.reset()
        return loss

    @property
    def _head_weight(self) -> Tensor:
        """[replicas, classes, units]"""
        return self.network.layout.tensors(self.weights)[-2]

    def _redraw(self, classes: list[Tensor]) -> None:
        """Draws the output layer's weights of these classes of each replica anew, from N(0, 2 / units)."""
        weight = self._head_weight
        units = weight.shape[2]
        for row, some, rng in zip(weight, classes, self.random["zap"], strict=True):
            if len(some):
                drawn = rng.normal(0, math.sqrt(2 / units), (len(some), units))
                row[some] = torch.from_numpy(drawn).to(weight)

    def _redraw_head(self) -> None:
        everything = torch.arange(self.network.classes, device=self.weights.device)
        self._redraw([everything] * len(self.seeds))

    # ------------------------------------------------------------ the stream

    def begin_task(self, t: int) -> None:
        super().begin_task(t)
        o = self.options
        if t == 0 and o.head == "linear" and o.online == "finetune" and o.reset_head:
            self._redraw_head()
            self.network.layout.tensors(self.weights)[-1].zero_()

    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        o, batch = self.options, Batch.of(x, y, t)
        if self.statistics_head is not None:
            if self.epoch == 0:
                self.statistics_head.add(self._features(x), y, self.network.classes)
            return batch.x.new_zeros(len(self.seeds))
        if o.online == "finetune":
            return self._finetune(batch)
        if o.zap == "row":
            self._redraw([y_r[~known[y_r]].unique() for y_r, known in zip(y, self.known, strict=True)])
            self.known.scatter_(1, y, True)
        return super().observe(x, t, y)

    def _finetune(self, batch: Batch) -> Tensor:
        o, network = self.options, self.network
        weights = self.weights[:, network.first_column(o.finetune_scope) :]
        with torch.no_grad():
            below = network.below(self.weights, batch.x, o.finetune_scope)
        derive = head_loss_and_gradient if o.finetune_scope == "head" else scope_loss_and_gradient
        loss, gradient = derive(network, weights, batch, below, o.finetune_scope)
        self.fine.step_(weights, gradient, o.finetune_lr)
        return loss

    def _features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network.features(self.weights, x)

    def scores(self, x: Tensor) -> Tensor:
        if self.statistics_head is None:
            return super().scores(x)
        return self.statistics_head.scores(self._features(x), self.network.classes)

    # ------------------------------------------------------------ what look-ahead leaves open

    def _look_ahead(self, weights: Tensor, rates: Tensor, batch: Batch, meta: Batch, **how):
        loss, by_weights, by_rates = super()._look_ahead(weights, rates, batch, meta, **how)
        by_rates[:, : self.network.first_column(self.options.scope)] = 0
        return loss, by_weights, by_rates

    def _step(self, gradient: Tensor, columns: slice = slice(None)) -> None:
        gate, scope = (self.network.first_column(part) for part in ("prediction", self.options.scope))
        slow = min(gate, scope)
        self.weights[:, :slow].sub_(gradient[:, :slow], alpha=self.options.gate_lr)
        self.weights[:, slow:scope].sub_(gradient[:, slow:scope], alpha=self.options.opt_wt)
        super()._step(gradient, slice(scope, None))
