"""Adam (Kingma and Ba 2015) for a weight matrix whose rows, the replicas, may have learning rates of their own."""

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam:
    """PyTorch's Adam, one pass over the numbers of each row. Defaults of both papers: betas .9 and .999, eps 1e-8.

    Its moments are taken when the first step is made, and dropped by `reset`.
    """

    BETAS, EPS = (0.9, 0.999), 1e-8

    def __init__(self):
        self.moments: list[Tensor] = []

    def reset(self) -> None:
        """Forgets all steps."""
        self.moments = []

    def step_(self, weights: Tensor, gradient: Tensor, rates) -> None:
        """One step, in place. weights, gradient: [replicas, n], rows contiguous; rates: a number, or one per row."""
        if not self.moments:
            self.moments = [torch.zeros_like(gradient), torch.zeros_like(gradient), gradient.new_zeros(len(gradient))]
        rates = [rates] * len(weights) if isinstance(rates, float) else rates
        rows = list(zip(weights, gradient, *self.moments, strict=True))
        for rate in dict.fromkeys(rates):
            *lists, steps = zip(*(row for row, its in zip(rows, rates, strict=True) if its == rate), strict=True)
            adam(*map(list, lists), [], list(steps), fused=True, amsgrad=False, beta1=self.BETAS[0],
                 beta2=self.BETAS[1], lr=rate, weight_decay=0.0, eps=self.EPS, maximize=False)  # fmt: skip

    def state_dict(self) -> dict:
        return {"moments": self.moments}

    def load_state_dict(self, state: dict) -> None:
        self.moments = [moment.clone() for moment in state["moments"]]
