import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from utils import legacy
from utils.metrics import metrics

MATRIX = np.array([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.6, 0.75, 0.9]])
BASELINE = np.array([0.1, 0.1, 0.2])
IN_ORDER = np.arange(3)


def test_by_hand():
    found = metrics(MATRIX, BASELINE, IN_ORDER)
    assert found == pytest.approx(
        {
            "retained_accuracy": (0.6 + 0.75 + 0.9) / 3,
            "learning_accuracy": (0.9 + 0.8 + 0.9) / 3,
            "backward_transfer_and_interference": (-0.3 - 0.05 + 0) / 3,
            "backward_transfer": (-0.3 - 0.05) / 2,
            "forward_transfer": ((0.2 - 0.1) + (0.3 - 0.2)) / 2,
            "forgetting": ((0.9 - 0.6) + (0.8 - 0.75)) / 2,
            "average_anytime_accuracy": (0.9 + 0.75 + 0.75) / 3,
        }
    )


@settings(deadline=None)
@given(st.integers(1, 6).flatmap(lambda t: arrays(float, (t + 1, t), elements=st.floats(0, 1))))
def test_against_loops_over_tasks(values):
    """A second, naive implementation; and RA = LA + BTI."""
    baseline, matrix = values[0].tolist(), values[1:].tolist()
    tasks = len(baseline)
    found = metrics(values[1:], values[0], np.arange(tasks))
    last = matrix[-1]
    assert found["retained_accuracy"] == pytest.approx(sum(last) / tasks)
    assert found["learning_accuracy"] == pytest.approx(sum(matrix[j][j] for j in range(tasks)) / tasks)
    assert found["retained_accuracy"] == pytest.approx(
        found["learning_accuracy"] + found["backward_transfer_and_interference"], abs=1e-9
    )
    if tasks == 1:
        assert found["backward_transfer_and_interference"] == 0 and np.isnan(found["forgetting"])
        return
    lost = [max(matrix[i][j] for i in range(j, tasks - 1)) - last[j] for j in range(tasks - 1)]
    assert found["forgetting"] == pytest.approx(sum(lost) / (tasks - 1), abs=1e-9)
    gained = [matrix[j - 1][j] - baseline[j] for j in range(1, tasks)]
    assert found["forward_transfer"] == pytest.approx(sum(gained) / (tasks - 1), abs=1e-9)
    anytime = [sum(matrix[i][: i + 1]) / (i + 1) for i in range(tasks)]
    assert found["average_anytime_accuracy"] == pytest.approx(sum(anytime) / tasks)


def test_mixed_tasks_are_all_learnt_in_the_one_phase():
    found = metrics(MATRIX[-1:], BASELINE, np.zeros(3, int))
    assert found["learning_accuracy"] == found["retained_accuracy"]
    assert found["backward_transfer_and_interference"] == 0
    assert np.isnan(found["forward_transfer"]) and np.isnan(found["forgetting"])


def test_the_published_text_layout():
    lines = legacy.results_txt(MATRIX, BASELINE, IN_ORDER).splitlines()
    assert lines[:3] == ["0.1000 0.1000 0.2000", "|", "0.9000 0.2000 0.1000"]
    assert lines[5:] == [
        "",
        "Diagonal Accuracy: 0.8667",
        "Final Accuracy: 0.7500",
        "Backward: -0.1167",
        "Forward: 0.0667",
    ]


def test_a_whole_run_keeps_the_identities(run):
    result = run("--model er --seeds 0 1")
    m = result.metrics
    np.testing.assert_allclose(m["retained_accuracy"], m["learning_accuracy"] + m["backward_transfer_and_interference"])
    summary = json.loads((result.folder / "summary.json").read_text())["metrics"]["retained_accuracy"]
    values = m["retained_accuracy"]
    assert summary["values"] == values.tolist()
    assert (summary["mean"], summary["std"]) == pytest.approx((values.mean(), values.std(ddof=1)))
