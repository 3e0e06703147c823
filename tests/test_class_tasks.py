"""Streams of classes: what a task is, how images are augmented, which outputs compete; and every algorithm on them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from benchmarks.records import differences
from dataloaders import augmentation
from dataloaders.class_orders import SUPERCLASS
from dataloaders.registry import DATASETS, build_stream
from dataloaders.stream import TrainingSet
from model import icarl
from model.batch import Batch
from model.gradients import loss_and_gradient
from model.networks import ConvNet, Heads
from model.registry import ALGORITHMS
from utils.config import configure
from utils.evaluation import evaluate
from utils.random_streams import generator

SMALL = "--n_tasks 2 --channels 4 --batch_size 5 --seeds 0 1"


@pytest.fixture
def cifar(images):
    """cifar(option=value ...): the stream, from the small set."""
    dataset = DATASETS["cifar100"]

    def build(**changes):
        return dataset.build(dataset.options(**changes), images)

    return build


@pytest.fixture
def train(run, images, monkeypatch, quick_plots):
    """train("--model er ...") runs main.py on the small CIFAR-100."""
    monkeypatch.setitem(DATASETS, "cifar100", dataclasses.replace(DATASETS["cifar100"], train_examples=20))

    def train(line="", dataset="cifar100"):
        return run(f"--dataset {dataset} --data_path {images} {SMALL} {line}", small=False)

    return train


# ---------------------------------------------------------------- tasks


def test_the_published_class_order_comes_out(cifar):
    stream = cifar()
    assert stream.order(0)[:20] == [23, 8, 11, 7, 48, 13, 1, 91, 94, 54, 16, 63, 52, 41, 80, 2, 47, 87, 78, 66]
    assert stream.order(1) != stream.order(0) and sorted(stream.order(1)) == list(range(100))
    assert cifar(class_order="chrono").order(5) == list(range(100))
    assert cifar(class_order="old").order(5)[:5] == [87, 0, 52, 58, 44]
    for t in range(20):
        group = cifar(class_order="super").order(0)[5 * t : 5 * t + 5]
        assert {SUPERCLASS[c] for c in group} == {t}


def test_a_class_order_of_ones_own(cifar, train, killed, refused, tmp_path):
    path = tmp_path / "order.txt"
    path.write_text(", ".join(map(str, range(99, 49, -1))) + "\n" + " ".join(map(str, range(50))))
    stream = cifar(class_order=str(path))
    assert stream.order(0) == stream.order(1) == [*range(99, 49, -1), *range(50)]
    assert stream.fingerprint != cifar().fingerprint
    folder = killed(lambda: train(f"--model online --checkpoint_minutes 0 --class_order {path}"), 2)
    for content, part in (("1 2 3", "3 entries"), ("0 " * 100, "'0'"), (" ".join(["x", *map(str, range(99))]), "'x'")):
        path.write_text(content)
        message = refused(f"--model er --dataset cifar100 --class_order {path}")
        assert f"--class_order {path}" in message and part in message
    path.write_text(" ".join(map(str, range(100))))
    assert "other data" in refused(f"--resume {folder}")


def test_a_task_has_five_classes_as_consecutive_labels(cifar):
    stream = cifar()
    assert stream.n_tasks == 20 and stream.n_classes == 100 and stream.input_shape == (3, 32, 32)
    for seed in (0, 3):
        x, y = stream.examples(2, "train", seed=seed)
        assert y.tolist() == [label for label in range(10, 15) for _ in range(20)]
        for label in range(10, 15):
            original = stream.order(seed)[label]
            expected = stream.images["train"][20 * original : 20 * original + 20]
            assert torch.equal(x[y == label], expected)


def test_validation_is_apart_for_every_class_and_the_same_for_all_seeds(cifar):
    stream = cifar(validation=0.1, class_order="chrono")
    assert [stream.size(0, split) for split in ("train", "validation", "test")] == [90, 10, 20]
    for c in range(100):
        parts = [set(stream.rows[split][c].tolist()) for split in ("train", "validation")]
        assert not parts[0] & parts[1] and parts[0] | parts[1] == set(range(20 * c, 20 * c + 20))
    assert torch.equal(stream.rows["validation"], cifar(validation=0.1).rows["validation"])
    assert not torch.equal(stream.rows["validation"], cifar(validation=0.1, stream_seed=1).rows["validation"])


def test_samples_per_task_counts_what_validation_takes_too(cifar):
    """La-MAML's scripts ask for 2,500 of 2,500, a tenth of them for validation: 2,250 are trained on."""
    stream = cifar(validation=0.1, samples_per_task=100)
    assert stream.training_size(0) == 90
    stream = cifar(validation=0.1, samples_per_task=50)
    drawn = TrainingSet(stream, 0, [0], (0, 1), 10)
    assert drawn.x.shape == (2, 45, 3, 32, 32)


def test_replicas_learn_their_own_orders_side_by_side(cifar):
    stream = cifar()
    packed = TrainingSet(stream, 1, [1], (3, 4), 8)
    for replica, seed in enumerate((3, 4)):
        solo = TrainingSet(stream, 1, [1], (seed,), 8)
        for (x, t, y), (solo_x, _, solo_y) in zip(packed.batches(0), solo.batches(0), strict=True):
            assert t == 1 and torch.equal(x[replica], solo_x[0]) and torch.equal(y[replica], solo_y[0])
    ((x, y),) = stream.evaluation_for(1, "test", (3, 4))
    for replica, seed in enumerate((3, 4)):
        ((solo_x, solo_y),) = stream.evaluation_for(1, "test", (seed,))
        assert torch.equal(x[replica], solo_x[0]) and torch.equal(y[replica], solo_y[0])


# ---------------------------------------------------------------- augmentation


def rngs(n):
    return [generator(seed, "test") for seed in range(n)]


def test_a_crop_is_a_window_of_the_padded_image_or_its_mirror_image():
    x = torch.randint(1, 256, (2, 6, 3, 8, 8), dtype=torch.uint8)
    cropped = augmentation.crop_and_flip(x, rngs(2))
    padded = F.pad(x, (4, 4, 4, 4))
    places = set()
    for r in range(2):
        for i in range(6):
            windows = {(dy, dx): padded[r, i, :, dy : dy + 8, dx : dx + 8] for dy in range(9) for dx in range(9)}
            windows = {**windows, **{(*place, "mirrored"): window.flip(2) for place, window in windows.items()}}
            found = [place for place, window in windows.items() if torch.equal(window, cropped[r, i])]
            assert len(found) == 1
            places.add(found[0])
    assert len(places) > 6


def test_places_and_mirroring_are_uniform():
    """Told from where one bright pixel comes to lie, in images so wide that mirrored ones cannot be mistaken."""
    x = torch.zeros(1, 3600, 1, 16, 40, dtype=torch.uint8)
    x[..., 8, 8] = 1
    found = augmentation.crop_and_flip(x, rngs(1))[0, :, 0].nonzero().numpy()
    assert len(found) == 3600
    rows, columns = np.bincount(found[:, 1], minlength=16), np.bincount(found[:, 2], minlength=40)
    assert stats.chisquare(rows[4:13]).pvalue > 1e-3 and rows[4:13].sum() == 3600
    assert stats.chisquare([*columns[4:13], *columns[27:36]]).pvalue > 1e-3


def test_brightness_is_a_factor_within_bounds():
    x = torch.full((2, 500, 3, 2, 2), 100, dtype=torch.uint8)
    bright = augmentation.brighten(x, rngs(2), 0.25)
    factors = bright[:, :, 0, 0, 0] / 100
    assert torch.equal(bright, factors[:, :, None, None, None].mul(100).expand_as(bright))
    assert 0.75 <= float(factors.min()) < 0.77 and 1.23 < float(factors.max()) <= 1.25
    assert float(augmentation.brighten(x * 2 + 55, rngs(2), 0.25).max()) == 255
    assert not torch.equal(factors[0], factors[1])


def test_augmentation_follows_the_batch_and_nothing_taken_before(cifar):
    stream = cifar()
    data, again = (TrainingSet(stream, 0, [0], (0, 1), 10) for _ in range(2))
    list(data.batches(0))
    assert torch.equal(data.batch(1, 3)[0], again.batch(1, 3)[0])
    assert not torch.equal(data.batch(1, 3)[0], data.batch(2, 3)[0])
    plain = TrainingSet(cifar(augment=False), 0, [0], (0,), 100)
    ((x, _, _),) = plain.batches(0)
    assert torch.allclose(x.sum(), stream.to_float(plain.x[0]).sum(), rtol=1e-4)


def test_images_are_normalised_by_channel(cifar):
    stream = cifar()
    x = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    expected = [(1 - m) / s for m, s in zip((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), strict=True)]
    torch.testing.assert_close(stream.to_float(x)[0, :, 5, 7], torch.tensor(expected))


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(("shape", "classes", "count"), [((3, 32, 32), 100, 1_419_940), ((3, 64, 64), 200, 2_873_640)])
def test_the_published_networks_have_the_published_parameters(shape, classes, count):
    assert ConvNet(shape, 160, classes).layout.parameters == count


def test_replicas_of_a_convolutional_network_are_plain_networks():
    network = ConvNet((3, 32, 32), 4, 10)
    weights = network.initial_weights(rngs(3), torch.float64)
    x = torch.randn(3, 5, 3, 32, 32, dtype=torch.float64)
    packed = network(weights, x)
    for r in range(3):
        parts = {name: values[r] for name, values in network.layout.named(weights).items()}
        h = x[r]
        for i in (1, 2, 3):
            h = F.conv2d(h, parts[f"conv{i}.weight"], parts[f"conv{i}.bias"], stride=2, padding=1).relu()
        h = h.flatten(1)
        for i in (1, 2):
            h = F.linear(h, parts[f"layer{i}.weight"], parts[f"layer{i}.bias"]).relu()
        expected = F.linear(h, parts["layer3.weight"], parts["layer3.bias"])
        torch.testing.assert_close(packed[r], expected)
        torch.testing.assert_close(network(weights[r : r + 1], x[r : r + 1])[0], expected)
    assert not torch.equal(packed[0], packed[1])
    assert float(network.layout.named(weights)["conv2.weight"].std()) == pytest.approx((2 / 36) ** 0.5, rel=0.1)


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_the_loss_is_that_of_the_outputs_that_compete(scenario):
    network = ConvNet((3, 32, 32), 2, 6)
    network.heads = Heads(6, 2, scenario)
    network.heads.begin(1)
    weights = network.initial_weights(rngs(1), torch.float64)
    x = torch.randn(1, 4, 3, 32, 32, dtype=torch.float64)
    y, t = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1]])
    loss, gradient = loss_and_gradient(network, weights, Batch(x, y, t))
    logits = network(weights, x)[0]
    if scenario == "task":
        expected = (F.cross_entropy(logits[:2, :2], y[0, :2]) + F.cross_entropy(logits[2:, 2:4], y[0, 2:] - 2)) / 2
    else:
        expected = F.cross_entropy(logits[:, :4], y[0])
    torch.testing.assert_close(loss[0], expected)
    assert (network.layout.named(gradient)["layer3.weight"][0, 4:] == 0).all(), "classes not seen are left alone"
    told, untold = (network.to_predict(logits[None], known)[0].argmax(1) for known in (0, None))
    assert set(told.tolist()) <= {0, 1} and set(untold.tolist()) <= {0, 1, 2, 3}


# ---------------------------------------------------------------- whole runs


QUICK = dict.fromkeys(("gem", "agem"), "--n_memories 20") | dict.fromkeys(("lamaml", "sync"), "--glances 2")
QUICK |= dict.fromkeys(("mer_alg6", "mer_alg7"), "--replay_batch_size 5")
QUICK["mer"] = "--replay_batch_size 5 --batches_per_example 2"


SCENARIOS = [(name, "task") for name in ALGORITHMS]
SCENARIOS += [(name, "class") for name, algorithm in ALGORITHMS.items() if not algorithm.needs_task]


@pytest.mark.parametrize(("name", "scenario"), SCENARIOS)
def test_every_algorithm_learns_and_goes_on_on_classes(name, scenario, train, run, killed):
    line = f"--model {name} --scenario {scenario} --samples_per_task 30 --n_epochs {1 + (name == 'iid')}"
    line += f" {QUICK.get(name, '')}"
    whole = train(line)
    assert whole.exit_code == 0
    results = json.loads((whole.folder / "1" / "results.json").read_text())
    assert 0 <= results["retained_accuracy_task_agnostic"] <= results["retained_accuracy"]
    assert (whole.folder / "1" / "accuracy_matrix_task_agnostic.csv").exists()
    folder = killed(lambda: train(line + " --checkpoint_minutes 0"), 5)
    resumed = run(f"--resume {folder}", small=False)
    told = {f"{seed}/training_parameters.json" for seed in (0, 1)}  # how often there are checkpoints is there
    assert set(differences(whole.folder, resumed.folder)) == told


@pytest.mark.parametrize(("wanted", "validation", "n"), [(4, 0.9, 1), (1, 0.5, 1), (20, 0.1, 18), (0, 0.5, 50)])
def test_a_small_task_is_never_taken_for_a_whole_one(wanted, validation, n, cifar):
    assert cifar(samples_per_task=wanted, validation=validation).training_size(0) == n


def test_icarl_needs_room_only_for_the_classes_that_are_learnt(train):
    result = train("--model icarl --samples_per_task 30 --n_memories 10")
    assert result.exit_code == 0 and (result.metrics["retained_accuracy"] > 0).all()


def test_more_than_one_epoch_is_multi_pass():
    def glances(line):
        return configure(f"--model lamaml --dataset cifar100 {line}".split()).learner.glances

    assert [glances(line) for line in ("", "--n_epochs 1", "--n_epochs 5", "--n_epochs 10")] == [10, 10, 1, 1]


@pytest.mark.parametrize("mode", ["", "--as_published"])
def test_icarl_as_published_herds_on_the_outputs_of_the_task(mode, train, monkeypatch):
    used, original = [], icarl.herding

    def herding(features, *args):
        used.append(features.abs().sum(dim=(0, 1)).nonzero().flatten().tolist())
        return original(features, *args)

    monkeypatch.setattr(icarl, "herding", herding)
    train(f"--model icarl --samples_per_task 30 {mode}")
    if mode:
        assert used[0] == list(range(5)) and set(used[1]) >= set(range(5, 10))
    else:
        assert len(used[0]) > 5


def test_packed_equals_solo_on_images(train):
    packed, solo = (
        train("--model lamaml --samples_per_task 40 --glances 1"),
        train("--model lamaml --samples_per_task 40 --glances 1 --seeds 1"),
    )
    np.testing.assert_allclose(solo.matrices[0], packed.matrices[1], atol=1e-6)


def test_tinyimagenet_too(train, capsys):
    line = "--model er --validation 0.25"
    whole = train(line, "tinyimagenet")
    assert whole.exit_code == 0
    capsys.readouterr()
    more = train(f"{line} --samples_per_task 2500", "tinyimagenet")
    assert "--samples_per_task 2500 is more than the 20 training images" in capsys.readouterr().err
    np.testing.assert_array_equal(more.matrices, whole.matrices)


class Knowing:
    """A learner that knows every class, but not the task: its scores are right among all classes but for task 1."""

    seeds = (0, 1)

    def __init__(self, stream):
        self.stream, self.network = stream, ConvNet(stream.input_shape, 1, stream.n_classes)
        self.network.heads = Heads(stream.n_classes, stream.classes_per_task, "task")
        self.network.heads.begin(1)

    def scores(self, x):
        expected = next(self.answers)
        logits = F.one_hot(expected, self.stream.n_classes).float()
        return logits + (expected >= 5)[..., None] * F.one_hot(torch.tensor(0), self.stream.n_classes) * 2


def test_task_aware_and_task_agnostic_accuracy(cifar):
    """Both from one pass; not told the task, examples of task 1 are taken for class 0."""
    stream = cifar(n_tasks=3)
    learner = Knowing(stream)
    learner.answers = iter(y for t in range(3) for _, y in stream.evaluation_for(t, "test", learner.seeds))
    accuracy, _, agnostic = evaluate(learner, stream, "test", None, True)
    assert accuracy.tolist() == [[1, 1, 1]] * 2
    assert agnostic.tolist() == [[1, 0, 0]] * 2


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--dataset cifar100 --increment 7", ["--increment 7", "100 classes"]),
        ("--dataset cifar100 --n_tasks 21", ["--n_tasks 21", "at most 20"]),
        ("--dataset cifar100 --increment 1", ["--increment 1", "--scenario class"]),
        ("--dataset cifar100 --model independent --scenario class", ["independent", "--scenario class"]),
        ("--dataset cifar100 --model taskinput --scenario class", ["taskinput", "--scenario class"]),
        ("--dataset cifar100 --n_tasks 2 --model icarl --n_memories 9", ["--n_memories 9", "10 classes"]),
        ("--dataset tinyimagenet --class_order super", ["--class_order super", "tinyimagenet"]),
        ("--dataset cifar100 --class_order nosuch", ["--class_order nosuch", "random, chrono"]),
        ("--dataset cifar100 --samples_per_task 5000", ["--samples_per_task 5000", "2500"]),
        ("--dataset cifar100 --arch linear", ["--arch linear", "--arch pc_cnn"]),
        ("--dataset mnist_rotations --arch pc_cnn", ["--arch pc_cnn", "--arch linear"]),
        ("--dataset cifar100 --validation 0.0001", ["--validation 0.0001", "larger"]),
        ("--dataset cifar100 --data_path nowhere", ["--data_path nowhere", "get_data.py cifar100"]),
        ("--dataset tinyimagenet --data_path nowhere", ["--data_path nowhere", "get_data.py tinyimagenet"]),
        ("--dataset cifar100 --model icarl --n_memories 99", ["--n_memories 99", "100"]),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(line, parts, refused):
    message = refused(line)
    assert all(part in message for part in parts), message


def test_too_few_images_for_a_validation_part_of_every_class(images):
    dataset = DATASETS["tinyimagenet"]
    with pytest.raises(Exception, match="--validation 0.1 leaves a class of tinyimagenet without"):
        build_stream(dataset, dataset.options(validation=0.1), images)
