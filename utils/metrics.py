"""What an accuracy matrix says about learning and forgetting.

R[i, j] is the accuracy (a fraction) on task j after training phase i, T the number of tasks, l(j) the phase in which
task j was learnt (j itself unless tasks are mixed), b[j] the accuracy on task j before any training. The field uses
several formulas under one name; these are ours, and docs/metrics.md sets them beside the others:

    retained_accuracy (RA)                     mean_j R[last, j]
    learning_accuracy (LA)                     mean_j R[l(j), j]
    backward_transfer_and_interference (BTI)   mean over all T tasks of R[last, j] - R[l(j), j];  RA = LA + BTI
    backward_transfer                          sum_j (R[last, j] - R[l(j), j]) / (T - 1)             (GEM's divisor)
    forward_transfer                           sum_{j>=1} (R[l(j) - 1, j] - b[j]) / (T - 1)          (GEM)
    forgetting                                 sum_{j<T-1} (max_{l(j)<=i<last} R[i, j] - R[last, j]) / (T - 1)
    average_anytime_accuracy                   mean over phases i of the mean of R[i, j] over the tasks learnt by then

A quantity that needs a second task, an earlier phase, or an entry that was not evaluated (--evaluate_tasks) is nan.
Forgetting is Chaudhry et al.'s, but for phases before a task was learnt, which they count too.
"""

import numpy as np


def metrics(matrix: np.ndarray, baseline: np.ndarray, learned_at: np.ndarray) -> dict[str, float]:
    """All of the above.

    Args:
        matrix: [phases, tasks] fractions, nan where not evaluated. baseline: [tasks] fractions. learned_at: [tasks],
            the phase l(j).
    """
    phases, tasks = matrix.shape
    columns = np.arange(tasks)
    final, learnt = matrix[-1], matrix[learned_at, columns]
    others = tasks - 1
    sequential = phases > 1 and others > 0
    later = learned_at > 0
    return {
        "retained_accuracy": float(final.mean()),
        "learning_accuracy": float(learnt.mean()),
        "backward_transfer_and_interference": float((final - learnt).mean()),
        "backward_transfer": float((final - learnt).sum() / others) if others else float("nan"),
        "forward_transfer": float((matrix[learned_at[later] - 1, columns[later]] - baseline[later]).sum() / others)
        if sequential
        else float("nan"),
        "forgetting": _forgetting(matrix, learned_at) if sequential else float("nan"),
        "average_anytime_accuracy": float(np.mean([matrix[i, learned_at <= i].mean() for i in range(phases)])),
    }


def _forgetting(matrix: np.ndarray, learned_at: np.ndarray) -> float:
    earlier, final = matrix[:-1, :-1], matrix[-1, :-1]
    learnt = np.arange(len(earlier))[:, None] >= learned_at[:-1]
    return float((np.where(learnt, earlier, -np.inf).max(axis=0) - final).mean())
