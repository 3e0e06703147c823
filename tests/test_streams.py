import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.published import PublishedTasks
from dataloaders.registry import DATASETS, build_stream
from dataloaders.shifts import nearest_rotation
from dataloaders.stream import StreamOptions, TrainingSet
from utils.errors import UserError
from utils.evaluation import evaluate


def digits(**changes):
    dataset = DATASETS["digits_rotations"]
    return build_stream(dataset, dataset.options(**{**dataset.presets, **changes}), "nowhere")


def test_digits_need_no_download_and_split_without_overlap():
    stream = digits(validation=0.25)
    assert stream.n_tasks == 10 and stream.input_shape == (64,) and stream.n_classes == 10
    assert [stream.size(0, split) for split in ("train", "validation", "test")] == [899, 299, 599]
    images = {split: {x.numpy().tobytes() for x in stream.splits[split][0]} for split in stream.splits}
    assert not images["train"] & images["validation"]
    assert not images["test"] & (images["train"] | images["validation"])


def test_the_validation_part_is_the_same_for_every_seed_and_never_trained_on():
    stream = digits(validation=0.5, samples_per_task=0)
    held_out = {x.numpy().tobytes() for x in stream.examples(3, "validation")[0]}
    for seed in (0, 1):
        trained = TrainingSet(stream, 3, [3], [seed], 10).x[0]
        assert not held_out & {x.numpy().tobytes() for x in trained}


def test_angles_are_increasing_one_in_each_bin_and_follow_the_stream_seed():
    def angles(**changes):
        return [float(name.split()[2]) for name in digits(**changes).task_names]

    assert all(18 * t <= angle < 18 * (t + 1) for t, angle in enumerate(angles()))
    assert angles() == angles() != angles(stream_seed=1)


@pytest.mark.parametrize("angle", [0.0, 17.3, 90.0, 133.7])
def test_nearest_rotation_is_pillows(angle):
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    expected = np.stack([np.asarray(Image.fromarray(image).rotate(angle)).ravel() for image in images])
    np.testing.assert_array_equal(nearest_rotation(angle, 28)(torch.from_numpy(images)).numpy(), expected)


def test_replicas_see_their_own_examples_in_their_own_order_as_they_would_alone():
    stream = digits(samples_per_task=20)
    packed = list(TrainingSet(stream, 2, [2], (5, 6), 8).batches(0))
    assert [x.shape[1] for x, _, _ in packed] == [8, 8, 4]
    for replica, seed in enumerate((5, 6)):
        for (x, t, y), (alone_x, alone_t, alone_y) in zip(
            packed, TrainingSet(stream, 2, [2], (seed,), 8).batches(0), strict=True
        ):
            assert torch.equal(x[replica], alone_x[0]) and torch.equal(y[replica], alone_y[0]) and t == alone_t == 2
    assert not torch.equal(packed[0][0][0], packed[0][0][1])


def test_an_epoch_shows_every_example_once_in_a_new_order():
    data = TrainingSet(digits(samples_per_task=20), 0, [0], (0,), 8)
    first, second = ([x for x, _, _ in data.batches(epoch)] for epoch in (0, 1))
    first, second = torch.cat(first, 1)[0], torch.cat(second, 1)[0]
    assert not torch.equal(first, second)
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))


def test_mixed_tasks_carry_the_task_of_each_example():
    stream = digits(n_tasks=3, samples_per_task=10)
    batches = list(TrainingSet(stream, 0, [0, 1, 2], (0, 1), 30).batches(0))
    ((_, t, y),) = batches
    assert t.shape == y.shape == (2, 30)
    assert [torch.bincount(row).tolist() for row in t] == [[10, 10, 10]] * 2
    assert not torch.equal(t[0], t[0].sort().values)


def test_too_many_samples_are_refused_before_training():
    with pytest.raises(UserError, match="--samples_per_task 5000 .* 1198"):
        digits(samples_per_task=5000)


class Oracle:
    """Knows every label but those of the images it is told to miss."""

    seeds = (0, 1)

    def __init__(self, stream, miss=()):
        self.answers = {}
        for t in range(stream.n_tasks):
            x, y = stream.examples(t, "test")
            self.answers |= {key(stream.to_float(image)): int(label) for image, label in zip(x, y, strict=True)}
        for t, i in miss:
            image = stream.to_float(stream.examples(t, "test")[0][i])
            self.answers[key(image)] = (self.answers[key(image)] + 1) % 10

    def predict(self, x, t=None):
        labels = torch.tensor([[self.answers[key(image)] for image in row] for row in x])
        return torch.nn.functional.one_hot(labels, 10).float()


def key(image):
    return image.numpy().tobytes()


def test_every_test_sample_counts_the_last_one_too():
    stream = digits(n_tasks=2)
    accuracy, finite, _ = evaluate(Oracle(stream), stream, "test")
    assert torch.equal(accuracy, torch.ones(2, 2)) and finite.all()
    accuracy, _, _ = evaluate(Oracle(stream, miss=[(1, 598)]), stream, "test")
    torch.testing.assert_close(accuracy, torch.tensor([[1, 598 / 599]] * 2))


def test_evaluation_shows_the_same_examples_with_and_without_keeping_them(monkeypatch):
    kept = digits()
    first = [x for x, _ in kept.evaluation(4, "test")]
    again = [x for x, _ in kept.evaluation(4, "test")]
    monkeypatch.setattr("dataloaders.stream.EVALUATION_CACHE_BYTES", 0)
    computed = digits()
    for expected, *others in zip(first, again, [x for x, _ in computed.evaluation(4, "test")], strict=True):
        assert all(torch.equal(expected, other) for other in others)
    assert kept._kept
    assert not computed._kept


def published(path, tasks=3, n=30):
    torch.manual_seed(0)

    def part(size):
        return [[f"task {t}", torch.rand(size, 784), torch.randint(10, (size,))] for t in range(tasks)]

    content = part(n), part(10)
    torch.save(content, path)
    return content


def test_published_files_are_read_as_they_are(tmp_path):
    train, test = published(tmp_path / "mnist_rotations.pt")
    dataset = DATASETS["mnist_rotations"]
    stream = build_stream(dataset, dataset.options(n_tasks=2, samples_per_task=5), tmp_path)
    assert isinstance(stream, PublishedTasks) and stream.task_names == ["task 0", "task 1"]
    x, y = stream.examples(1, "test")
    assert torch.equal(x, test[1][1]) and torch.equal(y, test[1][2])
    data = TrainingSet(stream, 1, [1], (0, 1), 10)
    assert data.x.shape == (2, 5, 784) and all(any(torch.equal(x, image) for image in train[1][1]) for x in data.x[0])
    stream = PublishedTasks(
        "mnist_rotations", StreamOptions(n_tasks=3, validation=0.2), tmp_path / "mnist_rotations.pt"
    )
    assert (stream.size(0, "train"), stream.size(0, "validation"), stream.size(0, "test")) == (24, 6, 10)


def test_a_published_file_is_not_taken_for_more_tasks_than_it_has(tmp_path):
    published(tmp_path / "mnist_rotations.pt")
    dataset = DATASETS["mnist_rotations"]
    assert dataset.origin(tmp_path) == "mnist_rotations.pt"
    assert dataset.origin(tmp_path / "elsewhere") == "computed"
    with pytest.raises(UserError, match="--n_tasks 20 is more than the 3"):
        build_stream(dataset, dataset.options(), tmp_path)


def damaged(**change):
    """A published file with one thing wrong in its last task."""
    tasks = [["t", torch.rand(4, 6), torch.zeros(4, dtype=torch.int64)] for _ in range(4)]
    tasks[-1] = ["t", change.get("x", tasks[-1][1]), change.get("y", tasks[-1][2])]
    return tasks[:2], tasks[2:]


BROKEN = [
    {"x": torch.rand(3, 6), "y": torch.zeros(3, dtype=torch.int64)},
    {"x": torch.rand(4, 5)},
    {"x": torch.rand(4, 6).double()},
    {"y": torch.zeros(4)},
    {"y": torch.full((4,), -1)},
    {"y": torch.zeros(3, dtype=torch.int64)},
]


@pytest.mark.parametrize("change", BROKEN, ids=range(len(BROKEN)))
def test_published_files_with_one_odd_task_are_refused(tmp_path, change):
    torch.save(damaged(**change), tmp_path / "mnist_rotations.pt")
    dataset = DATASETS["mnist_rotations"]
    with pytest.raises(UserError, match="mnist_rotations.pt is not a readable file"):
        build_stream(dataset, dataset.options(n_tasks=2), tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not a torch file", {"a": 1}, [[1], [2]], ([["t", torch.rand(3, 784), torch.zeros(2)]],) * 2]
)
def test_damaged_published_files_are_refused(tmp_path, content):
    path = tmp_path / "mnist_permutations.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    dataset = DATASETS["mnist_permutations"]
    with pytest.raises(UserError, match="mnist_permutations.pt is not a readable file"):
        build_stream(dataset, dataset.options(n_tasks=1), tmp_path)


class TestRealMnist:
    def test_sizes_and_pixels(self, mnist_data):
        dataset = DATASETS["mnist_rotations"]
        stream = build_stream(dataset, dataset.options(samples_per_task=1000), mnist_data)
        assert (stream.size(0, "train"), stream.size(0, "test"), stream.n_classes, stream.input_shape) == (
            60000,
            10000,
            10,
            (784,),
        )
        x, y = next(stream.evaluation(19, "test"))
        assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1 and y[:5].tolist() == [7, 2, 1, 0, 4]

    def test_every_permutation_is_one_the_first_task_too(self, mnist_data):
        dataset = DATASETS["mnist_manypermutations"]
        stream = build_stream(dataset, dataset.options(**dataset.presets), mnist_data)
        assert stream.n_tasks == 100
        raw = stream.splits["test"][0][:50].flatten(1)
        for t in (0, 99):
            shown, _ = stream.examples(t, "test", torch.arange(50))
            assert not torch.equal(shown, raw) and torch.equal(shown.sort(1).values, raw.sort(1).values)
