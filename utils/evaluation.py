"""How well every task is known right now."""

import torch
from torch import Tensor


def evaluate(learner, stream, split: str, tasks=None, agnostic: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Accuracy on every task, each of its examples counted once; the task is told to `predict`.

    Changes no weight and draws no random number. UserError if the data were changed since they were opened.
    tasks: those to evaluate; None for all. agnostic: whether to count, too, what is right when the task is not told.

    Returns: accuracy [replicas, tasks], fractions, nan for tasks that were not asked for; finite [replicas], whether
    all outputs were finite numbers; the task-agnostic accuracy, None if it was not asked for.
    """
    replicas = len(learner.seeds)
    shape = replicas, stream.n_tasks
    accuracy, unaware = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    finite = torch.ones(replicas, dtype=torch.bool)
    stream.refuse_changed()
    for t in range(stream.n_tasks) if tasks is None else sorted(tasks):
        right, right_unaware, total = torch.zeros(replicas), torch.zeros(replicas), 0
        for x, y in stream.evaluation_for(t, split, learner.seeds):
            if agnostic:
                scores = learner.scores(x)
                logits = learner.network.to_predict(scores, t)
                right_unaware += _right(learner.network.to_predict(scores, None), y)
            else:
                logits = learner.predict(x, t)
            right += _right(logits, y)
            finite &= logits.isfinite().flatten(1).all(dim=1).cpu()
            total += y.shape[1]
        accuracy[:, t], unaware[:, t] = right / total, right_unaware / total
    stream.refuse_changed()
    for values in (accuracy, unaware):
        values[~finite] = torch.nan
    return accuracy, finite, unaware if agnostic else None


def _right(logits: Tensor, y: Tensor) -> Tensor:
    """How many are right in each replica."""
    return (logits.argmax(dim=2) == y).sum(dim=1).cpu()
