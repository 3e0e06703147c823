"""Pictures of a run. Functions of plain arrays, so that they can be drawn again from a record."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils import atomic


def save(path, figure: Figure) -> None:
    with atomic.whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")


def accuracy_matrix(matrix: np.ndarray, title: str) -> Figure:
    """matrix: [phases, tasks] fractions. Row: after task i; column: accuracy on task j."""
    phases, tasks = matrix.shape
    figure = Figure(figsize=(6.4, 5.4 if phases > 1 else 2.2))
    axes = figure.add_subplot()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, label="accuracy")
    if tasks <= 20:
        for (i, j), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                axes.text(
                    j,
                    i,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if value < 0.6 else "black",
                )
    axes.set(xlabel="evaluated on task", ylabel="after learning task", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    return figure


def task_accuracy(steps: list[int], curve: np.ndarray, title: str) -> Figure:
    """One line per task over the evaluations, and their mean over the tasks evaluated.

    steps: [evaluations]; curve: [evaluations, tasks] fractions, nan where not evaluated.
    """
    tasks = curve.shape[1]
    figure = Figure(figsize=(7.2, 4.2))
    axes = figure.add_subplot()
    colours = _colours(tasks)
    marker = "." if np.isnan(curve).any() else None  # or what was evaluated between gaps would not be seen
    for t in range(tasks):
        axes.plot(steps, curve[:, t], color=colours[t], linewidth=1, marker=marker, label=f"task {t}")
    axes.plot(steps, np.ma.masked_invalid(curve).mean(axis=1), color="black", linewidth=2, label="mean")
    if tasks <= 20:
        axes.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel="batches observed", ylabel="accuracy", ylim=(0, 1), title=title)
    return figure


def by_length(results: list[dict]) -> Figure:
    """Accuracy against the number of classes learnt, mean and standard deviation over runs; see utils/meta_test.py."""
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.add_subplot()
    classes = [row["classes"] for row in results]
    for split, label in (("train", "images learnt"), ("test", "images held out")):
        mean = np.array([row[split]["mean"] for row in results])
        std = np.array([row[split]["std"] or 0 for row in results])
        axes.plot(classes, mean, marker="o", label=label)
        axes.fill_between(classes, mean - std, mean + std, alpha=0.2)
    axes.legend()
    axes.grid(alpha=0.3)
    axes.set(xlabel="classes learnt, one after the other", ylabel="accuracy", ylim=(0, 1))
    return figure


def alignment(steps: list[int], statistics: dict[str, list[float]], title: str) -> Figure:
    """Gradient alignment, and the learned rates of each layer if there are any, over the evaluations."""
    rates = [name.split("/", 1)[1] for name in statistics if name.startswith("rate_mean/")]
    figure = Figure(figsize=(7.2, 6.4 if rates else 3.4))
    axes = figure.subplots(1 + bool(rates), 1, sharex=True, squeeze=False)[:, 0]
    (cosine,) = axes[0].plot(steps, statistics["gradient_cosine"], color="tab:blue")
    axes[0].axhline(0, color="grey", linewidth=0.5)
    axes[0].set_ylabel("cosine", color=cosine.get_color())
    axes[0].set_title(f"{title}\ngradients of new and replayed examples")
    right = axes[0].twinx()
    right.plot(steps, statistics["gradient_dot_product"], color="tab:orange")
    right.set_ylabel("dot product", color="tab:orange")
    if rates:
        for name, colour in zip(rates, _colours(len(rates)), strict=True):
            mean, std = (np.array(statistics[f"rate_{kind}/{name}"]) for kind in ("mean", "std"))
            axes[1].plot(steps, mean, color=colour, label=name)
            axes[1].fill_between(steps, mean - std, mean + std, color=colour, alpha=0.15)
        axes[1].legend(fontsize=7, ncols=2)
        axes[1].set_ylabel("learned rates: mean ± std")
    axes[-1].set_xlabel("batches observed")
    return figure


def _colours(n: int):
    return matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, n))
