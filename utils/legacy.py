"""results.txt and results.pt, laid out as the La-MAML and MER programs wrote them, for scripts that read those.

One difference: results.pt holds plain types only (options as a dict), so torch.load(weights_only=True) reads it.
"""

import numpy as np
import torch


def statistics(matrix: np.ndarray, baseline: np.ndarray, learned_at: np.ndarray) -> dict[str, float]:
    """LA, RA, BTI and FWT with the published divisors (T everywhere); see utils/metrics.py for the arguments."""
    columns = np.arange(matrix.shape[1])
    final, learnt = matrix[-1], matrix[learned_at, columns]
    later = learned_at > 0
    gained = matrix[learned_at[later] - 1, columns[later]] - baseline[later]
    return {
        "Diagonal Accuracy": learnt.mean(),
        "Final Accuracy": final.mean(),
        "Backward": (final - learnt).mean(),
        "Forward": gained.sum() / len(columns),
    }


def results_txt(matrix, baseline, learned_at) -> str:
    """The baseline row, a bar, the accuracy matrix, and the four figures."""
    rows = [" ".join(f"{value:.4f}" for value in row) for row in [baseline, *matrix]]
    figures = [f"{name}: {value:.4f}" for name, value in statistics(matrix, baseline, learned_at).items()]
    return "\n".join([rows[0], "|", *rows[1:], "", *figures]) + "\n"


def results_pt(labels, accuracies, weights: dict, matrix, baseline, learned_at, options: dict) -> tuple:
    """(task labels, accuracies [evaluations, tasks], weights, [LA, RA, BTI, FWT], one line, options)."""
    figures = statistics(matrix, baseline, learned_at)
    one_line = f"{options} # val: " + " ".join(f"{value:.3f}" for value in figures.values())
    tensors = [torch.tensor(value) for value in figures.values()]
    return (
        torch.tensor(labels, dtype=torch.float32),
        torch.tensor(np.array(accuracies)),
        weights,
        tensors,
        one_line,
        options,
    )
