"""Whole runs of main.py on a small digits stream, and the records they leave."""

import json
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.lookahead import LookaheadMAML
from model.registry import ALGORITHMS
from utils.loop import Loop

METRICS = {
    "retained_accuracy",
    "learning_accuracy",
    "backward_transfer_and_interference",
    "backward_transfer",
    "forward_transfer",
    "forgetting",
    "average_anytime_accuracy",
}


def weights_of(result):
    return {
        seed.name: torch.load(seed / "results.pt", weights_only=True)[2]
        for seed in result.folder.iterdir()
        if seed.is_dir()
    }


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for seed in first:
        for name in first[seed]:
            assert torch.equal(first[seed][name], second[seed][name]), (seed, name)


def test_a_run_leaves_the_whole_record(run, capsys):
    result = run("--seeds 3 4 --log_alignment --expt_name mine")
    assert result.exit_code == 0 and result.folder.name.startswith("mine-") and result.folder.parent.name == "lamaml"
    assert {path.name for path in result.folder.iterdir()} == {
        "3", "4", "summary.json", "accuracy_matrix.png", "task_accuracy.png", "alignment.png",
    }  # fmt: skip
    for replica, seed in enumerate((3, 4)):
        folder = result.folder / str(seed)
        names = {path.name for path in folder.iterdir()}
        assert {name for name in names if not name.startswith("events.out.tfevents")} == {
            "training_parameters.json", "results.json", "results.txt", "results.pt", "accuracy_matrix.csv",
            "evaluations.csv", "alignment.csv", "accuracy_matrix.png", "task_accuracy.png", "alignment.png",
        }  # fmt: skip
        parameters = json.loads((folder / "training_parameters.json").read_text())
        assert parameters["seed"] == seed and parameters["data"] == "computed"
        assert parameters["options"]["n_tasks"] == 3 and parameters["sources"]["n_tasks"] == "command line"
        assert parameters["versions"]["torch"] == torch.__version__
        results = json.loads((folder / "results.json").read_text())
        assert results.keys() >= METRICS | {
            "status",
            "train_seconds",
            "evaluation_seconds",
            "peak_memory_bytes",
            "units",
        }
        assert results["status"] == "completed" and results["peak_memory_bytes"] > 10**7
        matrix = np.loadtxt(folder / "accuracy_matrix.csv", delimiter=",", skiprows=1)[:, 1:]
        np.testing.assert_allclose(matrix, result.matrices[replica], atol=1e-6)
        assert results["retained_accuracy"] == pytest.approx(matrix[-1].mean(), abs=1e-6)
        labels, accuracies, weights, stats, line, options = torch.load(folder / "results.pt", weights_only=True)
        assert (
            labels.tolist() == [0, 0, 1, 2]
            and accuracies.shape == (4, 3)
            and (options["model"], options["seed"]) == ("lamaml", seed)
        )
        assert [float(stat) for stat in stats[:2]] == pytest.approx(
            [results["learning_accuracy"], results["retained_accuracy"]]
        )
        assert weights["layer1.weight"].shape == weights["rate.layer1.weight"].shape == (16, 64) and "# val:" in line
        events = EventAccumulator(str(folder)).Reload()
        assert len(events.Scalars("loss")) == 12
        assert [e.step for e in events.Scalars("accuracy_test/task_02")] == [0, 4, 8, 12]
        assert {"alignment/gradient_cosine", "rate_mean/layer1.weight"} <= set(events.Tags()["scalars"])
    printed = capsys.readouterr()
    assert "retained accuracy" in printed.out and "±" in printed.out and str(result.folder) in printed.out
    assert "task 3/3" in printed.err and "accuracy so far" in printed.err


@pytest.mark.usefixtures("quick_plots")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_same_command_same_matrix_and_packed_equals_solo(name, run):
    line = f"--model {name} --seeds 0 1"
    packed, again, solo = run(line), run(line), run(f"--model {name} --seed 1")
    np.testing.assert_array_equal(packed.matrices, again.matrices)
    assert_same_weights(weights_of(packed), weights_of(again))
    np.testing.assert_allclose(solo.matrices[0], packed.matrices[1], atol=2 / 599)
    for name_, tensor in weights_of(solo)["1"].items():
        torch.testing.assert_close(tensor, weights_of(packed)["1"][name_], rtol=1e-3, atol=1e-4)
    assert packed.folder != again.folder


@pytest.mark.usefixtures("quick_plots")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_evaluating_more_often_or_watching_changes_nothing_learnt(name, run):
    seldom = run(f"--model {name} --seeds 0 1")
    extra = "--log_alignment" if ALGORITHMS[name].learner.replays else ""
    often = run(f"--model {name} --seeds 0 1 --log_every 1 {extra}")
    validated = run(f"--model {name} --seeds 0 1 --log_every 3 --calc_test_accuracy")
    np.testing.assert_array_equal(seldom.matrices, often.matrices)
    assert_same_weights(weights_of(seldom), weights_of(often))
    assert_same_weights(weights_of(seldom), weights_of(validated))
    evaluations = np.loadtxt(often.folder / "0" / "evaluations.csv", delimiter=",", skiprows=1)
    assert evaluations[:, 0].tolist() == list(range(13))


def test_mixed_tasks_are_recorded_like_any_other_run(run):
    result = run("--model iid --seeds 0 1 --n_epochs 3")
    assert result.matrices.shape == (2, 1, 3)
    found = json.loads((result.folder / "0" / "results.json").read_text())
    assert found["learning_accuracy"] == found["retained_accuracy"] and found["backward_transfer_and_interference"] == 0
    assert found["forgetting"] is None


def test_validation_is_measured_on_its_own_data(run):
    line = "--model er --lr 0.05 --seed 0 --validation 0.2"
    on_test, both = run(line), run(line + " --evaluate_on validation --calc_test_accuracy")
    assert_same_weights(weights_of(on_test), weights_of(both))
    results = json.loads((both.folder / "0" / "results.json").read_text())
    assert results["evaluated_on"] == "validation"
    assert results["retained_accuracy_test"] == pytest.approx(on_test.metrics["retained_accuracy"][0])
    assert results["retained_accuracy"] != results["retained_accuracy_test"]
    assert (both.folder / "0" / "accuracy_matrix_test.csv").exists()


@pytest.mark.parametrize("tasks", ["seen", "new"])
def test_evaluating_fewer_tasks_changes_no_metric(tasks, run, capsys):
    line = "--model er --seeds 0 1 --n_tasks 4"
    whole, fewer = run(line), run(f"{line} --evaluate_tasks {tasks}")
    unknown = {"forgetting", "average_anytime_accuracy"} if tasks == "new" else set()
    for name, values in whole.metrics.items():
        expected = np.full(2, np.nan) if name in unknown else values
        np.testing.assert_array_equal(fewer.metrics[name], expected)
    evaluated = np.triu(np.ones((4, 4)), 2) == 0
    if tasks == "new":
        evaluated &= np.tril(np.ones((4, 4)), -1) == 0
        evaluated[-1] = True
    np.testing.assert_array_equal(np.isfinite(fewer.matrices), np.broadcast_to(evaluated, (2, 4, 4)))
    np.testing.assert_array_equal(fewer.matrices[:, evaluated], whole.matrices[:, evaluated])
    printed = capsys.readouterr().out
    assert "er on digits_rotations, 2 seeds" in printed


def test_alignment_is_recorded_at_each_evaluation_for_learners_without_rates_too(run):
    result = run("--model er --seed 0 --log_alignment")
    rows = (result.folder / "0" / "alignment.csv").read_text().splitlines()
    assert rows[0] == "step,phase,gradient_cosine,gradient_dot_product" and len(rows) == 5
    assert rows[1].endswith("nan,nan")
    cosines = [float(row.split(",")[2]) for row in rows[2:]]
    assert all(-1 <= cosine <= 1 for cosine in cosines) and len(set(cosines)) == 3


def test_the_alignment_measures_the_angle_between_the_two_gradients():
    from model.alignment import GradientAlignment
    from model.batch import Batch
    from model.gradients import loss_and_gradient
    from model.networks import MLP

    network = MLP(3, [4], 2)
    weights = network.initial_weights([np.random.default_rng(s) for s in (0, 1)])
    torch.manual_seed(0)
    new, old = (Batch.of(torch.randn(2, 5, 3), torch.randint(2, (2, 5)), 0) for _ in range(2))
    measured = GradientAlignment(2)
    measured.add(network, weights, new, old)
    measured.add(network, weights, new, new)
    measured.add(network, weights, new, None)
    g, h = (loss_and_gradient(network, weights, b)[1] for b in (new, old))
    cosine = (g * h).sum(1) / (g.norm(dim=1) * h.norm(dim=1))
    torch.testing.assert_close(measured.means()["gradient_cosine"], (cosine + 1) / 2)
    torch.testing.assert_close(measured.means()["gradient_dot_product"], ((g * h).sum(1) + (g * g).sum(1)) / 2)


def test_divergence_stops_the_run_and_is_recorded(run, capsys):
    result = run("--model online --lr 1e30 --seeds 0 1 --samples_per_task 1000 --batch_size 5")
    assert result.exit_code == 3 and result.status == "diverged"
    results = json.loads((result.folder / "1" / "results.json").read_text())
    assert results["status"] == "diverged" and 1 <= results["diverged_at_step"] <= 10
    assert results["steps"] < 100, "it ran on although every replica had diverged"
    assert results["train_seconds"] > 0
    losses = EventAccumulator(str(result.folder / "1")).Reload().Scalars("loss")
    fault = results["diverged"]
    assert (fault["what"], fault["step"], fault["phase"]) == ("loss", results["diverged_at_step"], 0)
    assert (fault["last_loss"], fault["last_loss_step"]) == (pytest.approx(losses[-1].value), losses[-1].step)
    assert fault["last_loss_step"] == fault["step"] - 1 and fault["parameters_of_step"] == 0
    assert "retained_accuracy" not in results
    assert "diverged at step" in capsys.readouterr().out


def test_only_the_replica_that_diverged_is_given_up(run, monkeypatch):
    healthy = run("--model er --seeds 0 1")
    build = Loop.__init__

    def poisoned(self, learner, *args, **kwargs):
        learner.weights[1, 0] = torch.nan
        build(self, learner, *args, **kwargs)

    monkeypatch.setattr(Loop, "__init__", poisoned)
    result = run("--model er --seeds 0 1")
    assert result.exit_code == 3 and list(result.faults) == [1]
    np.testing.assert_allclose(result.matrices[0], healthy.matrices[0], atol=2 / 599)
    assert np.isnan(result.metrics["retained_accuracy"][1])
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["status_of_seeds"] == {"0": "completed", "1": "diverged"}
    assert summary["metrics"]["retained_accuracy"]["mean"] == result.metrics["retained_accuracy"][0]
    fault = json.loads((result.folder / "1" / "results.json").read_text())["diverged"]
    assert (fault["what"], fault["step"], fault["phase"]) == ("layer1.weight", 0, -1)
    assert fault["last_loss"] is fault["parameters_of_step"] is None


@pytest.mark.parametrize(("poison", "what"), [("rates", "rate.layer1.weight"), ("weights", "layer1.weight")])
def test_the_record_has_the_last_good_values_of_a_replica_that_diverged(poison, what, run, monkeypatch):
    """Rates or weights of seed 1 become infinite as the third task begins; the losses do not tell."""
    begin, observe, good = LookaheadMAML.begin_task, LookaheadMAML.observe, {}

    def begin_task(self, t):
        begin(self, t)
        if t == 2:
            good.update({name: values[1].clone() for name, values in self.named_parameters().items()})
            getattr(self, poison)[1, 5] = torch.inf

    def deaf(self, x, t, y):
        return torch.ones(2) if t == 2 else observe(self, x, t, y)

    monkeypatch.setattr(LookaheadMAML, "begin_task", begin_task)
    monkeypatch.setattr(LookaheadMAML, "observe", deaf)
    result = run("--model lamaml --seeds 0 1")
    assert (result.exit_code, list(result.faults)) == (3, [1])
    results = json.loads((result.folder / "1" / "results.json").read_text())
    assert results["diverged"] == {
        "what": what, "step": 12, "phase": 2, "last_loss": 1.0, "last_loss_step": 12, "parameters_of_step": 8
    }  # fmt: skip
    for name, values in weights_of(result)["1"].items():
        assert torch.equal(values, good[name]), name
    assert np.isnan(result.matrices[1, 2]).all() and np.isfinite(result.matrices[0]).all()
    assert np.isfinite(result.matrices[1, :2]).all()


def test_no_file_thread_or_signal_handler_is_left_behind(run):
    def left():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), handlers

    run("--seed 0")
    before = left()
    run("--seeds 0 1")
    with pytest.raises(SystemExit):
        run("--seed 0 --data_path nowhere --dataset mnist_rotations")
    assert left() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_whole_run_on_cuda(run):
    line = "--seeds 0 1 --second_order --log_every 2 --log_alignment"
    cpu, cuda = run(line), run(line + " --device cuda")
    assert cuda.exit_code == 0
    np.testing.assert_allclose(cuda.matrices, cpu.matrices, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_deterministic_repetitions_are_identical(run):
    line = "--seeds 0 1 --second_order --device cuda --deterministic"
    assert_same_weights(weights_of(run(line)), weights_of(run(line)))


def test_deterministic_algorithms_are_on_while_the_run_lasts(run, monkeypatch):
    seen = []
    spoil = LookaheadMAML.begin_task

    def begin_task(self, t):
        seen.append(torch.are_deterministic_algorithms_enabled())
        spoil(self, t)

    monkeypatch.setattr(LookaheadMAML, "begin_task", begin_task)
    plain, strict = run("--seed 0"), run("--seed 0 --deterministic")
    assert seen == [False] * 3 + [True] * 3 and not torch.are_deterministic_algorithms_enabled()
    assert_same_weights(weights_of(plain), weights_of(strict))
