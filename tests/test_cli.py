"""The command line: what older scripts say still works, and what cannot work is refused in one sentence."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloaders.registry import DATASETS
from main import main
from model.registry import ALGORITHMS
from utils import papers
from utils.config import configure, resolve
from utils.errors import UserError

# The lines of La-MAML's run_experiments.sh for MNIST: common part, then what each experiment adds.
LAMAML_COMMON = (
    "--n_layers 2 --n_hiddens 100 --data_path data/ --log_every 100 --samples_per_task {n} --dataset {stream}"
    " --cuda --log_dir logs/"
)
LAMAML_LINE = (
    "--model lamaml --memories {m} --batch_size 10 --replay_batch_size 10 --n_epochs 1 --glances {g} {rest}"
    " --use_old_task_memory --seed 0"
)
LAMAML = [
    ("mnist_rotations", 1000, 200, 5, "--opt_lr 0.1 --opt_wt 0.1 --alpha_init 0.1 --sync_update", "cmaml"),
    ("mnist_rotations", 1000, 200, 5, "--opt_lr 0.1 --opt_wt 0.3 --alpha_init 0.15 --learn_lr --sync_update", "sync"),
    ("mnist_rotations", 1000, 200, 5, "--opt_lr 0.3 --alpha_init 0.15 --learn_lr", "lamaml"),
    ("mnist_permutations", 1000, 200, 5, "--opt_wt 0.1 --alpha_init 0.03 --sync_update", "cmaml"),
    (
        "mnist_permutations",
        1000,
        200,
        5,
        "--opt_lr 0.1 --opt_wt 0.1  --alpha_init 0.15 --learn_lr --sync_update",
        "sync",
    ),
    ("mnist_permutations", 1000, 200, 5, "--opt_lr 0.3 --alpha_init 0.15 --learn_lr", "lamaml"),
    ("mnist_manypermutations", 200, 500, 5, "--opt_wt 0.15 --alpha_init 0.03 --sync_update", "cmaml"),
    (
        "mnist_manypermutations",
        200,
        500,
        10,
        "--opt_lr 0.1 --opt_wt 0.03  --alpha_init 0.03 --learn_lr --sync_update",
        "sync",
    ),
    ("mnist_manypermutations", 200, 500, 10, "--opt_lr 0.1 --alpha_init 0.1 --learn_lr", "lamaml"),
]
# The 57 lines of MER's mer_examples.sh: common part, then what each experiment adds, stream by stream.
MER_COMMON = (
    "--n_layers 2 --n_hiddens 100 --data_path data/ --save_path results/ --batch_size 1 --log_every 100"
    " --samples_per_task {n} --data_file {stream}.pt    --cuda no  --seed 0"
)
#: model -> its options, and for each line of it the stream (r, p, m) and their values.
MER_TABLE = {
    "online --lr {}": ["r .0003", "p .003", "m .003"],
    "independent --lr {}": ["r .01", "p .01", "m .01"],
    "ewc --lr {} --n_memories 10 --memory_strength {}": ["r .001 100.0", "p .01 10.0", "m .003 1.0"],
    "gem --lr {} --n_memories {} --memory_strength {}": [
        "r .01 256 1.0", "p .01 256 1.0", "m .01 51 0.0", "r .01 25 0.0", "p .01 25 1.0", "m .003 5 0.1",
        "r .01 10 0.0", "p .01 10 0.0",
    ],
    "eralg4 --lr {} --memories {} --replay_batch_size {}": [
        "r .1 5120 25", "p .1 5120 25", "m .1 5120 25", "r .1 500 5", "p .1 500 10", "m .1 500 25", "r .1 200 10",
        "p .1 200 10",
    ],
    "eralg5 --lr {} --memories {} --replay_batch_size {}": [
        "r .03 5120 100", "p .01 5120 25", "m .003 5120 10", "r .01 500 100", "p .01 500 25", "m .01 500 5",
        "r .01 200 50", "p .01 200 10",
    ],
    "meralg1 --lr {} --beta {} --gamma 1.0 --memories {} --replay_batch_size {} --batches_per_example {}": [
        "r .03 .03 5120 100 10", "p .03 .03 5120 100 10", "m .1 .01 5120 5 10", "r .1 .01 500 10 10",
        "p .03 .03 500 25 10", "m .03 .03 500 5 10", "r .1 .01 200 10 5", "p .03 .03 200 10 10",
    ],
    "meralg6 --lr {} --gamma {} --memories {} --replay_batch_size {}": [
        "r .03 .1 5120 100", "p .03 .1 5120 50", "m .03 .1 5120 25", "r .1 .03 500 10", "p .03 .3 500 10",
        "m .1 .03 500 5", "r .1 .03 200 25", "p .1 .03 200 5",
    ],
    "meralg7 --lr {} --gamma {} --memories {} --replay_batch_size {} --s {}": [
        "r .03 .03 5120 100 5", "p .01 .1 5120 100 10", "m .03 .03 5120 100 10", "r .03 .03 500 50 5",
        "p .01 .1 500 25 10", "m .03 .03 500 5 10", "r .03 .03 200 50 5", "p .03 .1 200 5 2",
    ],
}  # fmt: skip
MER_STREAMS = {"r": ("mnist_rotations", 1000), "p": ("mnist_permutations", 1000), "m": ("mnist_manypermutations", 200)}
MER_NAMES = {"eralg4": "er", "eralg5": "er_tasks", "meralg1": "mer", "meralg6": "mer_alg6", "meralg7": "mer_alg7"}
MER = [
    (*MER_STREAMS[line.split()[0]], "--model " + form.format(*line.split()[1:]))
    for form, lines in MER_TABLE.items()
    for line in lines
]


def lamaml_line(stream, n, memories, glances, rest, _):
    return LAMAML_COMMON.format(n=n, stream=stream) + " " + LAMAML_LINE.format(m=memories, g=glances, rest=rest)


def mer_line(stream, n, rest):
    return MER_COMMON.format(n=n, stream=stream) + " " + rest


# The 40 lines of La-MAML's run_experiments.sh for CIFAR-100 and TinyImageNet: common part, then model and settings.
IMAGES_COMMON = (
    "--dataset {stream} --data_path {data_path} --log_dir logs/ --cuda --log_every 3125 --samples_per_task 2500"
    " --validation 0.1 --class_order random --increment 5 --arch pc_cnn --loader class_incremental_loader --workers 3"
    " --seed 0 --calc_test_accuracy --expt_name x --n_epochs {epochs}"
)
META = "--batch_size 10 --replay_batch_size 10 --memories {m} --cifar_batches 5"
SECOND = f"{META} --second_order"
BGD = "--model meta-bgd --batch_size 10 --replay_batch_size 10 --memories {m} --cifar_batches 3 --alpha_init 0.1"
BGD += " --xav_init --bgd_optimizer bgd --optimizer_params {{}} --train_mc_iters 2"
#: name -> its line, and what is added to it for CIFAR multi pass, single pass, TinyImageNet multi pass, single pass.
IMAGES = {
    "iid": (
        "--model iid2 --batch_size 32 --classes_per_it 4 --iterations 5000",
        ["--lr 0.03", None, "--lr 0.01", None],
    ),
    "er": (
        "--model eralg4 --batch_size 10 --replay_batch_size 1 --memories {m}",
        ["--lr 0.03 --glances 1", "--lr 0.03 --glances 10", "--lr 0.01 --glances 1", "--lr 0.01 --glances 2"],
    ),
    "la_er": (
        f"--model eralg4 --learn_lr {META} --opt_lr 0.1",
        ["--alpha_init 0.1 --glances 1"] * 2 + ["--alpha_init 0.03 --glances 1", "--alpha_init 0.3 --glances 2"],
    ),
    "icarl": (
        "--model icarl --batch_size 10 --n_memories {m} --memory_strength 1",
        [f"--lr 0.03 --glances {g} --grad_clip_norm 5" for g in (1, 2)]
        + [f"--lr 0.01 --glances {g} --grad_clip_norm {clip}" for g, clip in ((1, 2), (2, 5))],
    ),
    "gem": (
        "--model gem --batch_size 10 --n_memories 10 --memory_strength 0.5 --lr 0.03",
        [f"--glances {g} --grad_clip_norm {clip}" for g, clip in ((1, 5), (2, 5), (1, 2), (2, 5))],
    ),
    "agem": (
        "--model agem --batch_size 10 --n_memories 10 --memory_strength 0.5",
        ["--lr 0.03 --glances 1", "--lr 0.03 --glances 2", "--lr 0.01 --glances 1", "--lr 0.01 --glances 2"],
    ),
    "mer": (
        "--model meralg1 --batch_size 1 --replay_batch_size 25 --memories {m} --lr 0.1 --beta 0.1 --gamma 1.0"
        " --batches_per_example 10 --grad_clip_norm 10",
        [None, "", None, ""],
    ),
    "meta_bgd": (
        BGD,
        [f"--std_init {std} --mean_eta {eta} --glances {g}" for std, eta in ((0.02, 50), (0.015, 30)) for g in (1, 3)],
    ),
    "sync": (
        f"--model lamaml_cifar --learn_lr --sync_update {SECOND}",
        [f"--opt_lr 0.35 --alpha_init 0.1 --opt_wt 0.1 --glances {g}" for g in (1, 5)]
        + [f"--opt_lr 0.25 --alpha_init 0.075 --opt_wt 0.075 --glances {g}" for g in (1, 2)],
    ),
    "cmaml": (
        f"--model lamaml_cifar --sync_update --opt_lr 0.35 {SECOND}",
        [f"--alpha_init 0.075 --opt_wt 0.075 --glances {g}" for g in (1, 2)]
        + [f"--alpha_init 0.03 --opt_wt 0.03 --glances {g}" for g in (1, 2)],
    ),
    "lamaml": (
        f"--model lamaml_cifar --learn_lr --opt_wt 0.1 --alpha_init 0.1 --grad_clip_norm 1.0 {SECOND}",
        [
            "--opt_lr 0.25 --glances 1",
            "--opt_lr 0.25 --glances 10",
            "--opt_lr 0.4 --glances 1",
            "--opt_lr 0.4 --glances 2",
        ],
    ),
}
IMAGE_PLACES = [("cifar100", 10, 200), ("cifar100", 1, 200), ("tinyimagenet", 10, 400), ("tinyimagenet", 1, 400)]
DATA_PATHS = {"cifar100": "data/", "tinyimagenet": "data/tiny-imagenet-200/"}
IMAGE_LINES = [
    (name, stream, 50 if name == "iid" else epochs, m, f"{IMAGES_COMMON} {line} {added}")
    for name, (line, places) in IMAGES.items()
    for (stream, epochs, m), added in zip(IMAGE_PLACES, places, strict=True)
    if added is not None
]

PUBLISHED = [lamaml_line(*row) for row in LAMAML] + [mer_line(*row) for row in MER]


@pytest.mark.parametrize("row", LAMAML)
def test_lamaml_lines_mean_what_they_meant(row):
    stream, n, memories, glances, rest, name = row
    config = configure(lamaml_line(*row).split())
    assert (config.algorithm.name, config.dataset.name, config.seeds) == (name, stream, (0,))
    o = config.learner
    assert (config.stream.samples_per_task, o.memories, o.glances, o.replay_batch_size) == (n, memories, glances, 10)
    assert (o.learn_lr, o.sync_update) == ("--learn_lr" in rest, "--sync_update" in rest)
    assert (o.second_order, o.grad_clip_norm, config.run.batch_size) == (False, 2.0, 10)
    bare = configure(f"--model {name} --dataset {stream}".split())
    unread = {"opt_lr"} if name == "cmaml" else {"opt_wt"} if name == "lamaml" else set()
    for group in ("network", "stream", "learner"):
        ours, theirs = (dataclasses.asdict(c.groups()[group]) for c in (bare, config))
        assert {k: v for k, v in ours.items() if k not in unread} == {
            k: v for k, v in theirs.items() if k not in unread
        }


def test_the_table_holds_all_lines_of_mers_script():
    assert len(set(MER)) == 57


@pytest.mark.parametrize("row", MER, ids=lambda row: f"{row[0]} {row[2]}")
def test_mer_lines_mean_what_they_meant(row):
    """Every flag reaches its option, and the settings are those of a row of papers/mer.toml."""
    stream, n, rest = row
    config = configure(mer_line(*row).split())
    (_, model, *words) = rest.split()
    assert config.algorithm.name == MER_NAMES.get(model, model)
    assert (config.dataset.name, config.stream.samples_per_task, config.run.batch_size) == (stream, n, 1)
    assert (config.run.log_dir, config.run.device, config.network.init) == ("results/", "cpu", "xavier_uniform")
    for flag, value in zip(words[::2], words[1::2], strict=True):
        assert config.values[flag.removeprefix("--")] == float(value)
    pair = ("papers/mer.toml", config.algorithm.name, stream)
    same = [r for r in papers.rows() if (r.file, r.model, r.dataset) == pair]
    assert any(all(config.values[name] == value for name, value in r.settings.items()) for r in same)
    if config.algorithm.name in ("er", "er_tasks"):
        assert (config.learner.grad_clip_norm, config.learner.glances) == (0, 1)


def test_there_are_forty_lines_for_images():
    assert len(set(IMAGE_LINES)) == 40


@pytest.mark.parametrize(("name", "stream", "epochs", "m", "line"), IMAGE_LINES, ids=lambda value: str(value)[:20])
def test_image_lines_mean_what_they_meant(name, stream, epochs, m, line):
    """Every line gives the settings that its algorithm has by default, single or multi pass (papers/)."""
    config = configure(line.format(stream=stream, epochs=epochs, m=m, data_path=DATA_PATHS[stream]).split())
    assert (config.algorithm.name, config.dataset.name, config.run.n_epochs) == (name, stream, epochs)
    bare = configure(f"--model {name} --dataset {stream} --n_epochs {epochs} --validation 0.1".split())
    unread = {"cmaml": {"opt_lr"}, "lamaml": {"opt_wt"}}.get(name, set()) | {"samples_per_task"}
    for group in ("network", "stream", "learner"):
        ours, theirs = (dataclasses.asdict(c.groups()[group]) for c in (bare, config))
        assert {k: v for k, v in ours.items() if k not in unread} == {
            k: v for k, v in theirs.items() if k not in unread
        }
    assert config.run.batch_size == bare.run.batch_size


@pytest.mark.parametrize(("name", "stream", "epochs", "m", "line"), IMAGE_LINES, ids=lambda value: str(value)[:20])
def test_image_lines_run(name, stream, epochs, m, line, images, tmp_path, quick_plots):
    line = line.format(
        stream=stream, epochs=epochs, m=m, data_path=images / Path(DATA_PATHS[stream]).relative_to("data")
    )
    size = f"--samples_per_task 10 --n_tasks 2 --channels 2 --validation 0.25 --log_dir {tmp_path} --log_every 0"
    assert main([*line.split(), *size.split()]).exit_code == 0


def test_the_lines_of_mers_unit_tests_and_its_other_flags():
    lines = [row for row in MER if row[0] == "mnist_rotations"]
    assert all(configure(mer_line("mnist_rotations", 10, rest).split()) for _, _, rest in lines)
    config = configure(f"{mer_line('mnist_rotations', 10, '--model independent --lr 0.01')} --finetune no".split())
    assert config.learner.finetune is False
    config = configure(f"{mer_line('mnist_rotations', 10, '--model taskinput --lr 0.01')} --shuffle_tasks no".split())
    assert config.algorithm.name == "taskinput" and "shuffle_tasks" in config.notes[0]


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_lines_run(line, mnist_data, tmp_path):
    size = f"--samples_per_task 6 --n_tasks 2 --data_path {mnist_data} --log_dir {tmp_path} --log_every 0"
    assert main([*line.split(), *size.split()]).exit_code == 0


@pytest.mark.parametrize(
    ("line", "name", "switches"),
    [
        ("--model lamaml", "lamaml", (True, False)),
        ("--model sync", "sync", (True, True)),
        ("--model cmaml", "cmaml", (False, True)),
        ("--model lamaml --sync_update", "cmaml", (False, True)),
        ("--model lamaml --learn_lr --sync_update", "sync", (True, True)),
        ("--model cmaml --learn_lr", "lamaml", (True, False)),
        ("--model lamaml --learn_lr no", "lamaml", (False, False)),
        ("--model lamaml_cifar --learn_lr", "lamaml", (True, False)),
    ],
)
def test_switches_are_literal_once_one_is_given(line, name, switches):
    config = configure(line.split())
    assert config.algorithm.name == name
    assert (config.learner.learn_lr, config.learner.sync_update) == switches


def test_a_flag_that_the_published_code_never_read_is_noted_and_others_are_refused(refused):
    config = configure("--model agem --memory_strength 0.5".split())
    assert "--memory_strength has no effect: A-GEM" in config.notes[0]
    assert "--memory_strength is an option of" in refused("--model er --memory_strength 0.5")


def test_sources_of_values_and_who_wins():
    config = configure("--model lamaml --dataset mnist_rotations".split())
    assert (config.learner.opt_lr, config.sources["opt_lr"]) == (0.3, "papers/lamaml.toml")
    assert config.seeds == (0, 1, 2, 3, 4)
    config = configure("--model lamaml --dataset mnist_rotations --as_published --opt_lr 0.2 --seed 3".split())
    assert (config.learner.opt_lr, config.sources["opt_lr"]) == (0.2, "command line")
    assert (config.learner.snapshot, config.sources["snapshot"]) == ("live", "--as_published")
    assert config.seeds == (3,)
    assert configure("--model lamaml --dataset cifar100".split()).seeds == (0, 1, 2), "as the paper's"
    config = configure("--model lamaml --as_published --reservoir uniform".split())
    assert (config.learner.reservoir, config.sources["reservoir"]) == ("uniform", "command line")


@pytest.mark.parametrize("name", ["lamaml", "sync", "cmaml", "er"])
def test_as_published_undoes_our_corrections(name):
    ours, published = (configure(f"--model {name}{mode}".split()).learner for mode in ("", " --as_published"))
    assert (ours.reservoir, ours.replacement) == ("uniform", False)
    assert (published.reservoir, published.replacement) == ("inclusive", True)
    if name == "er":
        assert (ours.remember, published.remember) == ("first_epoch", "every_epoch")
    else:
        assert (ours.inner_clip, ours.snapshot, published.inner_clip, published.snapshot) == (
            True,
            "copy",
            False,
            "live",
        )
        assert ours.meta_loss == published.meta_loss == "all"
        assert ours.inner_rates == published.inner_rates == "relu"


def test_older_names_and_spellings():
    assert configure(["--model", "iid2"]).algorithm.name == "iid"
    assert configure(["--xav_init"]).network.init == "xavier_normal"
    assert configure(["--cifar_batches", "5"]).learner.inner_steps == 5
    assert configure(["--replay_batch_size", "20.0"]).learner.replay_batch_size == 20
    assert configure("--model eralg4 --learn_lr".split()).algorithm.name == "la_er"
    assert configure("--model eralg4 --learn_lr no".split()).algorithm.name == "er"
    assert configure("--model meta-bgd".split()).algorithm.name == "meta_bgd"
    config = configure("-order random -inc 5 --workers 3 --loader task_incremental_loader --tf_dir x".split())
    assert len(config.notes) == 5 and all("has no effect" in note for note in config.notes)


def test_a_list_that_a_stream_fills_can_be_emptied():
    assert len(configure("--model anml --dataset omniglot".split()).run.evaluate_after) == 8
    assert configure("--model anml --dataset omniglot --evaluate_after none".split()).run.evaluate_after == ()


@pytest.mark.parametrize("flag", ["--help", "--list", "--show_config"])
def test_informing_flags_print_and_stop(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        main([flag, "--model", "lamaml"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "lamaml" in printed
    if flag != "--show_config":
        assert all(name in printed for name in ALGORITHMS) and "mnist_manypermutations" in printed
    else:
        assert "papers/own.toml" in printed and "default" in printed


def test_help_names_every_flag_under_its_algorithms(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    groups = capsys.readouterr().out.split("\n\n")
    (lookahead,) = [group for group in groups if group.startswith("algorithm lamaml, sync, cmaml:")]
    assert all(f"--{name} " in lookahead for name in ("alpha_init", "opt_lr", "memories", "glances"))
    (online,) = [group for group in groups if group.startswith("algorithm online, iid:")]
    assert "--lr " in online and "--memories" not in online


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--model lamamml", ["lamamml", "lamaml"]),
        ("--dataset mnist_rotation", ["mnist_rotation", "mnist_rotations"]),
        ("--data_file mnist_rot.pt", ["mnist_rot", "mnist_rotations"]),
        ("--replay_batchsize 3", ["--replay_batchsize", "replay_batch_size"]),
        ("--zzz", ["--zzz"]),
        ("lamaml", ["'lamaml'", "--name value"]),
        ("--model online --alpha_init 0.1", ["--alpha_init", "lamaml, sync, cmaml", "online"]),
        (
            "--dataset mnist_permutations --interpolation nearest",
            ["--interpolation", "mnist_rotations", "mnist_permutations"],
        ),
        ("--memories 0", ["--memories 0", "--memories 200"]),
        ("--model er --memories 0", ["--memories 0", "online"]),
        ("--memories -1", ["--memories -1", "at least 0"]),
        ("--memories 2.5", ["--memories 2.5", "whole number"]),
        ("--alpha_init nan", ["--alpha_init nan", "finite"]),
        ("--opt_lr 1e999", ["--opt_lr 1e999", "finite"]),
        ("--model online --lr 0", ["--lr 0", "above 0"]),
        ("--init zeros", ["--init zeros", "kaiming_normal"]),
        ("--learn_lr maybe", ["--learn_lr maybe", "yes or no"]),
        ("--n_epochs", ["--n_epochs", "one argument"]),
        ("--seed 1 --seeds 1 2", ["--seed", "--seeds", "exclude"]),
        ("--seeds 1 1", ["--seeds 1 1", "twice"]),
        ("--seed -3", ["--seed -3", "at least 0"]),
        ("--seed x", ["--seed x", "whole number"]),
        ("--dataset digits_rotations --data_file mnist_rotations.pt", ["--dataset", "--data_file"]),
        ("--device gpu", ["--device gpu", "cuda"]),
        ("--dataset= --seed 0", ["--dataset  is not known"]),
        ("--device cpu:0", ["--device cpu:0", "cuda:N"]),
        ("--device cuda:²", ["--device cuda:²", "cuda:N"]),
        ("--log_dir=", ["--log_dir ''", "such as log"]),
        ("--expt_name ../x", ["--expt_name '../x'", "letters"]),
        ("--n_tasks 1e8", ["--n_tasks 1e8", "at most"]),
        ("--batch_size 1e30", ["--batch_size 1e30", "at most"]),
        ("--n_hiddens 900000", ["more memory", "--n_hiddens"]),
        ("--test_batch 3", ["--test_batch", "test_batch_size"]),
        ("--alpha_init 0", ["--alpha_init 0", "above 0"]),
        ("--device cuda:77", ["cuda:77", "--device cpu"]),
        ("--alpha_init 1e39", ["--alpha_init 1e39", "32-bit"]),
        ("--seed 99999999999999999999", ["--seed 9999", "at most"]),
        ("--evaluate_on validation", ["--validation 0.1"]),
        ("--evaluate_on train", ["--evaluate_on train", "test or validation"]),
        ("--validation 0.95", ["--validation 0.95", "0.9"]),
        ("--validation 0.0001", ["--validation 0.0001", "larger"]),
        ("--samples_per_task 4000", ["--samples_per_task 4000", "1198"]),
        ("--model online --log_alignment", ["--log_alignment", "online"]),
        ("--evaluate_after 3 no", ["--evaluate_after 3 no cannot", "whole numbers above 0, or none", "default none"]),
        ("--model anml --online finetune --log_alignment", ["--log_alignment", "anml replays none here"]),
        ("--model oml --head gaussian --log_alignment", ["--log_alignment", "oml replays none here"]),
        ("--dataset mnist_rotations --data_path nowhere", ["nowhere", "get_data.py mnist"]),
        ("--model gem --n_memories 0", ["--n_memories 0", "gem", "--n_memories 10"]),
        ("--model agem --n_memories 0", ["--n_memories 0", "agem"]),
        ("--model ewc --n_memories 0", ["--n_memories 0", "ewc"]),
        ("--model icarl --n_memories 0", ["--n_memories 0", "icarl", "--n_memories 200"]),
        ("--model gem --n_memories 5 --batch_size 6", ["--batch_size 6", "--n_memories 5", "--n_memories 6"]),
        ("--model icarl --n_memories 9", ["--n_memories 9", "10 classes"]),
        ("--model gem --solver cvxopt", ["--solver cvxopt", "quadprog or nnls"]),
        ("--model mer --beta 1.5", ["--beta 1.5", "at most 1"]),
        ("--model mer --gamma -0.1", ["--gamma -0.1", "at least 0"]),
        ("--model mer_alg6 --beta 0.5", ["--beta", "mer", "not of mer_alg6"]),
        ("--model mer --memories 0", ["--memories 0", "mer"]),
        ("--model mer_alg7 --s 0", ["--s 0", "above 0"]),
        ("--model ewc --memory_strength -1", ["--memory_strength -1", "at least 0"]),
        ("--model agem --replay_batch_size 0", ["--replay_batch_size 0", "at least 1"]),
        ("--model meta_bgd --std_init 0", ["--std_init 0", "above 0"]),
        ("--model independent --memories 5", ["--memories", "not of independent"]),
        ("--log_dir /proc/nowhere", ["--log_dir /proc/nowhere", "writable"]),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(line, parts, refused):
    message = refused(line)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", ["taskinput", "independent"])
def test_a_stream_that_does_not_tell_the_task_is_refused(name, refused, monkeypatch):
    monkeypatch.setitem(
        DATASETS, "untold", dataclasses.replace(DATASETS["digits_rotations"], name="untold", gives_task=False)
    )
    message = refused(f"--model {name} --dataset untold")
    assert all(part in message for part in (name, "untold", "the task", "--model"))
    assert configure("--model er --dataset untold".split()).dataset.name == "untold"


names = st.sampled_from([*ALGORITHMS, "eralg4", "nosuch"])
words = st.sampled_from(["0", "-1", "1", "0.5", "nan", "inf", "1e400", "", "yes", "relu", "all", "١٢"])
flags = st.sampled_from(
    [
        "lr",
        "n_memories",
        "memory_strength",
        "beta",
        "gamma",
        "s",
        "memories",
        "glances",
        "alpha_init",
        "seed",
        "seeds",
        "batch_size",
        "meta_loss",
        "learn_lr",
        "validation",
        "cuda",
        "zz",
    ]
)


@settings(deadline=None, max_examples=200)
@given(names, st.lists(st.tuples(flags, words), max_size=4))
def test_no_command_line_ends_in_anything_but_a_configuration_or_a_sentence(model, given_flags):
    line = ["--model", model, *(part for flag, word in given_flags for part in (f"--{flag}", word))]
    try:
        config = configure(line)
    except UserError as error:
        assert str(error).endswith((".", ")."))
    else:
        assert config.run.batch_size >= 1


def test_resolve_takes_what_papers_say_as_well(refused):
    config = resolve({"model": "er", "dataset": "mnist_rotations", "memories": 500})
    assert config.learner.memories == 500
