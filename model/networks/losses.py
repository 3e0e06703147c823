"""Cross-entropy per replica, and its derivative by the logits."""

from torch import Tensor
from torch.nn import functional as F

from model.batch import Batch


def cross_entropy(logits: Tensor, batch: Batch, weighting=None, targets=None) -> Tensor:
    """Cross-entropy of each replica. logits: [replicas, batch, classes] -> [replicas].

    weighting, targets: see model.gradients.loss_and_gradient.
    """
    labels = batch.y.flatten() if targets is None else targets.flatten(0, 1)
    losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view_as(batch.y)
    return losses.mean(dim=1) if weighting is None else (losses * weighting).sum(dim=1)


def output_delta(logits: Tensor, batch: Batch, weighting=None, targets=None) -> tuple[Tensor, Tensor]:
    """The loss [replicas] and its derivative by the logits [replicas, batch, classes]."""
    log_p = logits.log_softmax(dim=2)
    delta = log_p.exp()
    if targets is None:
        right = batch.y[:, :, None]
        losses = -log_p.gather(2, right)[:, :, 0]
        delta.scatter_add_(2, right, delta.new_full((1, 1, 1), -1.0).expand_as(right))
    else:
        losses = -(targets * log_p).sum(dim=2)
        delta -= targets
    if weighting is None:
        weighting = 1 / batch.size
    if isinstance(weighting, Tensor):
        return (losses * weighting).sum(dim=1), delta.mul_(weighting[..., None])
    return losses.sum(dim=1) * weighting, delta.mul_(weighting)
