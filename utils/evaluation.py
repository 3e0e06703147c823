"""How well every task is known right now."""

import torch
from torch import Tensor


def evaluate(learner, stream, split: str, tasks=None) -> tuple[Tensor, Tensor]:
    """Accuracy on every task, each of its examples counted once; the task is told to `predict`.

    Changes no weight and draws no random number. UserError if the data were changed since they were opened.
    tasks: those to evaluate; None for all.

    Returns: accuracy [replicas, tasks], fractions, nan for tasks that were not asked for; finite [replicas],
    whether all outputs were finite numbers.
    """
    replicas = len(learner.seeds)
    columns = []
    stream.refuse_changed()
    finite = torch.ones(replicas, dtype=torch.bool)
    for t in range(stream.n_tasks):
        if tasks is not None and t not in tasks:
            columns.append(torch.full((replicas,), torch.nan))
            continue
        correct, total = torch.zeros(replicas), 0
        for x, y in stream.evaluation_for(t, split, learner.seeds):
            logits = learner.predict(x, t)
            correct += (logits.argmax(dim=2) == y).sum(dim=1).cpu()
            finite &= logits.isfinite().flatten(1).all(dim=1).cpu()
            total += y.shape[1]
        columns.append(correct / total)
    stream.refuse_changed()
    return torch.stack(columns, dim=1).masked_fill(~finite[:, None], torch.nan), finite
