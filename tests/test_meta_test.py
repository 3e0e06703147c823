"""The stream `omniglot`: trajectories of classes; meta-trained networks, saved and loaded; the fast meta-test."""

import json
import signal

import numpy as np
import pytest
import torch

from benchmarks.records import differences
from dataloaders import image_sets
from dataloaders.registry import DATASETS, build_stream
from dataloaders.stream import TrainingSet
from main import main
from utils import meta_test, saved_network, tables
from utils.config import resolve
from utils.errors import UserError

SMALL = "--dataset omniglot --channels 4 --n_tasks 6 --evaluate_after 3 --online finetune --finetune_lr 0.01"


@pytest.fixture(scope="session")
def omniglot(tmp_path_factory):
    """A data folder with as many classes as Omniglot has, each a pattern under noise."""
    data, rng = tmp_path_factory.mktemp("omniglot"), np.random.default_rng(0)
    arrays, first = {}, 0
    for split, classes in (("train", 964), ("test", 659)):
        patterns = rng.integers(0, 170, (classes, 1, 1, 28, 28), dtype=np.uint8)
        noise = rng.integers(0, 86, (classes, 20, 1, 28, 28), dtype=np.uint8)
        arrays[split] = (patterns + noise).reshape(-1, 1, 28, 28), first + np.arange(classes * 20) // 20
        first += classes
    image_sets.write(data / "omniglot", [f"alphabet/character{i:04d}" for i in range(first)], arrays)
    return data


@pytest.fixture
def stream(omniglot):
    """stream(option=value ...)"""
    dataset = DATASETS["omniglot"]
    return lambda **changes: build_stream(dataset, dataset.options(**changes), omniglot)


@pytest.fixture
def train(run, omniglot, quick_plots):
    """train("--model anml ...") runs main.py on it, with a small network, and without meta-training if not asked."""

    def train(line):
        steps = "" if "--meta_iterations" in line or "--pretrained" in line else "--meta_iterations 0"
        return run(f"{SMALL} --data_path {omniglot} {steps} {line}", small=False)

    return train


TRAINING = "--model anml --meta_iterations 2 --seeds 0 1"


@pytest.fixture(scope="session")
def trained(omniglot, tmp_path_factory):
    """The folder of a run that meta-trained two seeds."""
    logs = tmp_path_factory.mktemp("trained")
    return main(f"{SMALL} --data_path {omniglot} --log_dir {logs} {TRAINING}".split()).folder


# ---------------------------------------------------------------- the stream


def test_a_trajectory(stream):
    s = stream(n_tasks=30)
    assert (s.n_tasks, s.n_classes, s.classes_per_task, s.input_shape) == (30, 1000, 0, (1, 28, 28))
    found = {seed: [s.rows(t, "train", seed)[0] // 20 for t in range(30)] for seed in (0, 1)}
    assert len(set(map(int, found[0]))) == 30 and found[0] != found[1]
    assert found[0] != sorted(found[0])  # no two neighbours of one alphabet
    for seed in (0, 1):
        learnt, held = s.rows(7, "train", seed), s.rows(7, "test", seed)
        assert (len(learnt), len(held)) == (15, 5)
        assert sorted(torch.cat([learnt, held]) % 20) == list(range(20))
    x, y = s.examples(7, "train", seed=1)
    assert x.shape == (15, 1, 28, 28) and x.dtype == torch.uint8 and (y == 7).all()
    assert torch.equal(x, s.pool.flatten(0, 1)[s.rows(7, "train", 1)])
    ((x, y),) = s.evaluation_for(7, "test", (0, 1))
    assert x.shape == (2, 5, 1, 28, 28) and x.min() >= 0 and x.max() <= 1
    assert torch.equal(x[1], s.to_float(s.examples(7, "test", seed=1)[0]))
    batches = list(TrainingSet(s, 7, [7], (0, 1), 1).batches(0))
    assert len(batches) == 15 and batches[0][0].shape == (2, 1, 1, 28, 28) and batches[0][1] == 7


def test_the_same_seed_has_the_same_trajectory_however_long_it_is(stream):
    long, short = stream(n_tasks=30), stream(n_tasks=10)
    assert all(torch.equal(long.rows(t, "train", 3), short.rows(t, "train", 3)) for t in range(10))
    assert (stream(samples_per_task=10).rows(0, "train", 0) == long.rows(0, "train", 0)[:10]).all()


def test_classes_are_kept_apart(stream):
    """Meta-training, validation and test classes have no image in common, and --stream_seed says which is which."""

    def images(some):
        return {image.numpy().tobytes() for image in some.flatten(0, 1)}

    test, validation = stream(), stream(n_tasks=192, trajectory="validation")
    assert (len(test.background), len(test.pool), len(validation.pool)) == (772, 659, 192)
    assert torch.equal(test.background, validation.background)
    parts = [images(part) for part in (test.background, test.pool, validation.pool)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert len(stream(validation=0.0).background) == 964
    assert not torch.equal(stream(stream_seed=1).background, test.background)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--n_tasks 660", ["--n_tasks 660", "659 test classes"]),
        ("--trajectory validation --n_tasks 193", ["192 validation classes"]),
        ("--trajectory validation --validation 0 --n_tasks 5", ["--validation 0.2"]),
        ("--shots 20", ["--samples_per_task 20", "at most 19"]),
        ("--samples_per_task 0", ["at least 1"]),
        ("--evaluate_on validation", ["--trajectory validation"]),
        ("--arch oml_cnn", ["28 x 28", "--image_size 84"]),
        ("--image_size 84", ["has no omniglot84", "get_data.py omniglot"]),
        ("--arch linear", ["--arch linear takes flat examples"]),
        ("--evaluate_after 0", ["--evaluate_after", "whole numbers above 0"]),
        ("--n_tasks 3 --dataset mnist_rotations --meta_iterations 5", ["--meta_iterations 5", "--dataset omniglot"]),
        ("--fresh yes --episode_images 11", ["--episode_images 11", "at most 10"]),
    ],
)
def test_bad_input_gets_one_sentence(line, parts, refused, omniglot, tmp_path):
    dataset = "" if "--dataset" in line else "--dataset omniglot"
    said = refused(f"--model anml {dataset} --data_path {omniglot} --log_dir {tmp_path / 'logs'} {line}")
    assert all(part in said for part in parts), said
    assert not (tmp_path / "logs").exists()


def test_tasks_are_evaluated_after_the_lengths_that_are_asked_for(train):
    result = train("--model anml --seeds 0")
    seen = np.isfinite(result.matrices[0])
    assert seen[2].tolist() == [True] * 4 + [False] * 2  # after three classes: all learnt so far, and the next
    assert seen[1].tolist() == [False, True, True] + [False] * 3
    assert seen[5].all()


@pytest.mark.parametrize("model", ["er", "online", "cmaml", "oml"])
def test_other_algorithms_learn_trajectories_too(model, run, omniglot, quick_plots):
    extra = "--memories 20 --replay_batch_size 2 --glances 1" if model in ("er", "cmaml", "oml") else ""
    if model == "oml":
        extra += " --meta_iterations 0 --online lookahead --arch anml_cnn --image_size 28"
    line = f"--model {model} --dataset omniglot --data_path {omniglot} --channels 4 --n_tasks 3 --seeds 0 {extra}"
    assert run(line, small=False).status == "completed"


# ---------------------------------------------------------------- saved networks


def test_a_meta_trained_network_is_saved_and_starts_other_runs(train, trained):
    content = torch.load(trained / "0" / "network.pt", weights_only=True)
    assert content["model"] == "anml" and content["options"]["channels"] == 4
    assert content["weights"]["conv2.weight"].shape == (4, 4, 3, 3) and "gate.head.bias" in content["weights"]
    again = train(f"--model anml --pretrained {trained} --seeds 0 1")
    told = json.loads((again.folder / "0" / "training_parameters.json").read_text())
    assert told["options"]["meta_iterations"] == 0 and told["sources"]["channels"] == "command line"
    assert not (again.folder / "0" / "network.pt").exists()
    one = train(f"--model anml --pretrained {trained}/1/network.pt --seeds 1")
    np.testing.assert_array_equal(one.matrices[0], again.matrices[1])


def test_a_run_takes_over_what_shaped_the_network(trained, omniglot):
    config = resolve({"model": "anml", "dataset": "omniglot", "pretrained": f"{trained}/0/network.pt"})
    assert config.values["channels"] == 4 and config.sources["channels"].startswith("--pretrained")
    assert config.values["meta_iterations"] == 0 and config.values["validation"] == 0.2


@pytest.mark.parametrize(
    ("what", "line", "parts"),
    [
        ("nothing", "", ["there is no such file"]),
        ("text", "", ["is no saved network (PyTorch did not write it)"]),
        ("empty", "", ["is no saved network (PyTorch did not write it)"]),
        ("pickle", "", ["could run code"]),
        ("other", "", ["is no saved network", "options and weights"]),
        ("cut", "", ["is no saved network (it is damaged: its end is missing)"]),
        ("flipped", "", ["is no saved network (it is damaged: the checksum of its part"]),
        ("network", "--channels 8", ["--channels 8 disagrees", "has 4"]),
        ("network", "--gate no", ["--gate no disagrees"]),
        ("network", "--validation 0.3", ["--validation 0.3 disagrees"]),
        ("network", "--stream_seed 1", ["--stream_seed 1 disagrees"]),
        ("network", "--model er", ["another network than the options describe"]),
        ("network", "--model oml", ["--model oml disagrees", "holds a network of anml: give --model anml"]),
        ("list", "", ["no tensors of floating-point numbers with names"]),
        ("whole", "", ["no tensors of floating-point numbers with names"]),
        ("nan", "", ["its meta-training diverged"]),
        ("nobody", "", ["'nobody' is none that meta-trains"]),
        ("er", "", ["'er' is none that meta-trains"]),
        ("names", "", ["is none that meta-trains"]),
        ("fraction", "", ["--validation x cannot be used"]),
        ("silent", "", ["does not say its validation"]),
    ],
)
def test_networks_that_do_not_fit_are_refused(what, line, parts, trained, tmp_path, omniglot, refused):
    path, network = tmp_path / "some.pt", trained / "0" / "network.pt"
    if what in ("text", "empty"):
        path.write_text("no network" if what == "text" else "")
    elif what == "pickle":
        torch.save(torch.nn.Linear(2, 2), path)
    elif what == "other":
        torch.save({"weights": {}}, path)
    elif what == "cut":
        path.write_bytes(network.read_bytes()[:-200])
    elif what == "flipped":
        content = bytearray(network.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif what == "network":
        path = network
    elif what != "nothing":
        content = torch.load(network, weights_only=True)
        changes = {"list": {"weights": [1]}, "names": {"model": ["anml"]}, "nobody": {"model": "nobody"}}
        content |= {**changes, "er": {"model": "er"}}.get(what, {})
        if what == "nan":
            content["weights"]["head.bias"][0] = torch.nan
        elif what == "whole":
            content["weights"]["head.bias"] = content["weights"]["head.bias"].long()
        elif what == "fraction":
            content["options"]["validation"] = "x"
        elif what == "silent":
            del content["options"]["validation"]
        torch.save(content, path)
    model = "" if "--model" in line else "--model anml"
    said = refused(
        f"{model} --dataset omniglot --data_path {omniglot} --log_dir {tmp_path / 'new'} --n_tasks 3 {line}"
        f" --pretrained {path}"
    )
    assert all(part in said for part in parts), said
    assert not list((tmp_path / "new").rglob("*"))


def test_meta_training_that_was_stopped_goes_on(train, killed, trained, capsys):
    """Killed in meta-training after a checkpoint, it ends with the same network and the same results."""
    folder = killed(lambda: train(f"{TRAINING} --checkpoint_minutes 0"), 2)
    result = train(f"{TRAINING} --resume auto")
    assert result.folder == folder and "from step 0" in capsys.readouterr().err
    for seed in "01":
        one, other = (saved_network.load(place / seed / "network.pt")["weights"] for place in (folder, trained))
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert (folder / seed / "accuracy_matrix.csv").read_text() == (
            trained / seed / "accuracy_matrix.csv"
        ).read_text()


def test_a_run_is_not_taken_for_one_that_began_with_another_network(train, trained, tmp_path, capsys):
    path = tmp_path / "network.pt"
    path.write_bytes((trained / "0" / "network.pt").read_bytes())
    first = train(f"--model anml --pretrained {path} --seeds 0")
    with pytest.raises(SystemExit):
        train(f"--model anml --pretrained {path} --seeds 0 --resume auto")
    assert "is finished" in capsys.readouterr().err
    path.write_bytes((trained / "1" / "network.pt").read_bytes())
    assert train(f"--model anml --pretrained {path} --seeds 0 --resume auto").folder != first.folder


@pytest.mark.parametrize("head", ["linear", "gaussian"])
def test_a_run_that_was_stopped_in_its_stream_goes_on_and_says_what_it_began_with(head, train, trained, killed):
    line = f"--model anml --pretrained {trained}/0/network.pt --seeds 0 --head {head}"
    whole = train(line).folder
    folder = killed(lambda: train(f"{line} --checkpoint_minutes 0"), 30)
    assert train(f"--resume {folder}").folder == folder
    assert not set(differences(whole, folder)) - {"0/training_parameters.json"}  # how often there are checkpoints
    identity = json.loads((folder / "summary.json").read_text())["identity"]
    assert identity["pretrained_sha256"] == saved_network.digest(f"{trained}/0/network.pt", [0])


def test_meta_training_that_diverges_leaves_a_record_and_no_network(train):
    result = train("--model anml --meta_iterations 260 --alpha_init 1e30 --gate no --seeds 0 --channels 1")
    assert result.exit_code == 3 and result.status == "diverged"
    told = json.loads((result.folder / "0" / "results.json").read_text())
    assert told["status"] == "diverged" and not (result.folder / "0" / "network.pt").exists()


# ---------------------------------------------------------------- the fast meta-test


@pytest.fixture
def sweep(trained, omniglot, tmp_path, capsys):
    """sweep("--rates 0.01 ...") runs utils.meta_test on the trained networks and returns meta_test.json."""

    def sweep(line="", networks=trained):
        common = f"--networks {networks} --lengths 3 6 --runs 2 --validation_runs 2 --data_path {omniglot}"
        meta_test.main(f"{common} --out {sweep.out} {line}".split())
        return json.loads((sweep.out / "meta_test.json").read_text())

    sweep.out = tmp_path / "out"
    return sweep


def accuracy(result, n):
    """Held-out accuracy of every seed after n classes, by the plain path."""
    return [float(matrix[n - 1][:n].mean()) for matrix in result.matrices]


@pytest.mark.parametrize(
    ("flags", "plain"),
    [
        ("--rates 0.02", "--finetune_lr 0.02"),
        ("--head prototype", "--head prototype"),
        ("--head gaussian --prior_strengths 3", "--head gaussian --prior_strength 3"),
    ],
)
def test_the_fast_path_equals_observing(flags, plain, sweep, train, trained):
    """Features computed once and runs side by side tell what main.py tells, for every run, after every length."""
    results = sweep(flags, networks=trained / "0")["results"]
    slow = train(f"--model anml --pretrained {trained}/0/network.pt --seeds 0 1 {plain}")
    for row in results:
        assert row["test"]["values"] == pytest.approx(accuracy(slow, row["classes"]), abs=1e-6)
    assert any(value > 0 for row in results for value in row["test"]["values"])


def test_the_fast_path_learns_the_very_output_layer(train, trained, omniglot):
    options = meta_test.MetaTestOptions(data_path=str(omniglot))
    network = trained / "0" / "network.pt"
    fast = meta_test.Trajectories(network, options, "test", (0, 1), 6)
    heads = {}
    for runs in ([0], [0, 1]):  # alone and side by side
        for n, scores in fast.learn(runs, [0.01] * len(runs), [3, 6]):
            heads[len(runs), n] = scores(torch.eye(fast.table.shape[1])[None, :50].expand(len(runs), -1, -1))
    torch.testing.assert_close(heads[1, 6][0], heads[2, 6][0], rtol=1e-4, atol=1e-5)
    result = train(f"--model anml --pretrained {network} --seeds 0 1")
    saved = torch.load(result.folder / "1" / "results.pt", weights_only=True)
    weights = next(part for part in saved if isinstance(part, dict) and "head.weight" in part)
    expected = weights["head.weight"].T[:50] + weights["head.bias"]
    torch.testing.assert_close(heads[2, 6][1], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def liked(monkeypatch):
    """liked(rates): as if validation classes liked rates[n] best after n classes. Returns what is measured, in order:
    the pool of images, settings and lengths."""

    def liked(rates):
        asked, measure, start = [], meta_test.measure, meta_test.Trajectories.__init__

        def spy_start(trajectories, file, options, trajectory, *rest):
            start(trajectories, file, options, trajectory, *rest)
            trajectories.pool = trajectory

        def spy(trajectories, settings, stops, head, journal):
            found = measure(trajectories, settings, stops, head, journal)
            asked.append((trajectories.pool, tuple(settings), tuple(stops)))
            if trajectories.pool == "validation":
                for (setting, n), values in found.items():
                    values["test"] = [float(setting == rates[n])] * len(values["test"])
            return found

        monkeypatch.setattr(meta_test, "measure", spy)
        monkeypatch.setattr(meta_test.Trajectories, "__init__", spy_start)
        return asked

    return liked


def test_the_rate_is_chosen_on_validation_classes_only(sweep, liked):
    asked = liked({3: 0.001, 6: 0.1})
    content = sweep("--rates 0.001 0.01 0.1")
    assert [network["chosen"] for network in content["networks"]] == [[0.001, 0.1]] * 2
    validation = ("validation", (0.001, 0.01, 0.1), (3, 6))
    assert asked == [validation, ("test", (0.001,), (3,)), ("test", (0.1,), (6,))] * 2
    assert all(len(row["test"]["values"]) == 4 for row in content["results"])  # two networks, two runs


def test_long_trajectories_take_the_rate_of_the_longest_that_validation_has(train, sweep, liked):
    few = train("--model anml --meta_iterations 1 --seeds 0 --validation 0.005").folder  # 4 validation classes
    asked = liked({3: 0.001, 4: 0.1})
    content = sweep("--rates 0.001 0.1", networks=few)
    assert content["networks"][0]["chosen"] == [0.001, 0.1] and asked[0][2] == (3, 4)


def test_what_is_no_finite_number_is_not_right(sweep):
    assert all(value == 0 for row in sweep("--rates 3e38")["results"] for value in row["test"]["values"])


def test_table_and_plot(sweep, capsys):
    sweep("--rates 0.01")
    text = (sweep.out / "meta_test.md").read_text()
    assert "| classes | held-out accuracy | accuracy on what was learnt | learning rate |" in text
    assert "over 4 runs of 2 network(s)" in text and text.strip() in capsys.readouterr().out
    assert "Of the networks' own means, the standard deviation is at most " in text
    assert (sweep.out / "meta_test.png").stat().st_size > 0


def test_a_rate_at_the_edge_of_those_tried_is_said(sweep, liked):
    liked({3: 0.001, 6: 0.1})
    content = sweep("--rates 0.001 0.01 0.1")
    text = meta_test.table(content)
    assert "The smallest of --rates, 0.001, was best for 3 classes: smaller may be better still." in text
    assert "The largest of --rates, 0.1, was best for 6 classes: larger may be better still." in text
    content["options"]["rates"] = [0.0001, *content["options"]["rates"], 1.0]
    assert "better still" not in meta_test.table(content)
    content["options"]["rates"] = [0.001]
    assert "better still" not in meta_test.table(content)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ["--networks", "network.pt"]),
        ("--networks nowhere.pt", ["nowhere.pt", "there is no such file"]),
        ("--networks {trained} --lengths 700", ["--lengths 700", "659"]),
        ("--networks {trained} --lengths x", ["--lengths"]),
        ("--networks {trained} --rates 0", ["--rates", "numbers above 0"]),
        ("--networks {trained} nowhere.pt", ["nowhere.pt", "there is no such file"]),
        ("--networks {none} --lengths 3", ["--validation 0", "--rates 0.001"]),
        ("--networks {trained} {none} --lengths 3", ["mixes kinds", "validation 0.0"]),
        ("--networks {trained} {longer} --lengths 3", ["mixes kinds", "meta_iterations 1"]),
    ],
)
def test_bad_input_to_the_meta_test(line, parts, trained, train, omniglot, tmp_path, capsys):
    none = longer = ""
    if "{none}" in line:
        none = train("--model anml --meta_iterations 1 --seeds 0 --validation 0").folder
    if "{longer}" in line:
        longer = train("--model anml --meta_iterations 1 --seeds 0").folder
    capsys.readouterr()
    line = line.format(trained=trained, none=none, longer=longer)
    argv = [*line.split(), "--data_path", str(omniglot), "--out", f"{tmp_path}/o"]
    with pytest.raises(SystemExit) as stop:
        meta_test.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and all(part in said for part in parts), said
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags", ["--rates 0.001 0.01", "--head gaussian"])
def test_a_sweep_that_is_stopped_goes_on(flags, sweep, tmp_path, monkeypatch, capsys):
    """Told to stop after some trajectories, it says so, and ends as in one piece; those are not learnt again."""
    whole = sweep(flags)
    sweep.out, add, learnt = tmp_path / "again", meta_test.Journal.add, []

    def spy(journal, key, values):
        add(journal, key, values)
        learnt.append(key)
        if len(learnt) == 7:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(meta_test.Journal, "add", spy)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sweep(flags)
    assert stop.value.code == 143 and "stopped; 7 trajectories are kept" in capsys.readouterr().err
    with (sweep.out / "meta_test.jsonl").open("a") as file:
        file.write('\n[["cut')
    again = sweep(flags)
    assert again["results"] == whole["results"] and again["networks"] == whole["networks"]
    keys = [json.dumps(key) for key in learnt]
    assert len(set(keys)) == len(keys) and not (sweep.out / "meta_test.jsonl").exists()


def test_nothing_is_measured_twice_or_overwritten(sweep, trained, monkeypatch, capsys):
    sweep("--rates 0.01")
    before = (sweep.out / "meta_test.json").read_bytes()
    monkeypatch.setattr(meta_test, "measure", None)
    sweep("--rates 0.01")
    assert "measured before" in capsys.readouterr().out
    for line, networks in (("--rates 0.02", trained), ("--rates 0.01", trained / "0")):
        with pytest.raises(SystemExit):
            sweep(line, networks=networks)
        assert "of other networks or options" in capsys.readouterr().err
    assert (sweep.out / "meta_test.json").read_bytes() == before


def test_without_out_every_sweep_has_a_folder_of_its_own(trained, omniglot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for head in ("prototype", "gaussian --prior_strengths 3", "prototype"):
        line = f"--networks {trained} --lengths 3 --runs 1 --data_path {omniglot} --head {head}"
        meta_test.main(line.split())
    names = [path.parent.name for path in (tmp_path / "logs" / "meta_test").glob("*/meta_test.json")]
    assert sorted(name.rpartition("-")[0] for name in names) == ["anml-gaussian", "anml-prototype"]


def test_a_meta_test_is_kept_and_appears_in_the_table(sweep, tmp_path, monkeypatch):
    sweep("--rates 0.01")
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "results")
    tables.FOLDER.mkdir()
    path = tables.keep(sweep.out)
    assert path.name == "anml-second_order-4_channels-alpha_0.1-2-linear.json"
    row = tables.meta_tests().splitlines()[-1]
    assert row.startswith("| `anml` | 2, second order, 4 channels | 0.1 | linear | .") and row.endswith("| 2 × 2 |")
    (sweep.out / "meta_test.json").write_text("{}")
    with pytest.raises(UserError, match="no record of a meta-test"):
        tables.keep(sweep.out)
