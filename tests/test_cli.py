"""The command line: what older scripts say still works, and what cannot work is refused in one sentence."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from main import main
from model.registry import ALGORITHMS
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
# The lines of MER's mer_examples.sh for online learning and experience replay.
MER_COMMON = (
    "--n_layers 2 --n_hiddens 100 --data_path data/ --save_path results/ --batch_size 1 --log_every 100"
    " --samples_per_task {n} --data_file {stream}.pt    --cuda no  --seed 0"
)
MER = [
    ("mnist_rotations", 1000, "--model online --lr 0.0003"),
    ("mnist_permutations", 1000, "--model online --lr 0.003"),
    ("mnist_manypermutations", 200, "--model online --lr 0.003"),
    ("mnist_rotations", 1000, "--model eralg4 --lr 0.1 --memories 5120 --replay_batch_size 25"),
    ("mnist_permutations", 1000, "--model eralg4 --lr 0.1 --memories 5120 --replay_batch_size 25"),
    ("mnist_manypermutations", 200, "--model eralg4 --lr 0.1 --memories 5120 --replay_batch_size 25"),
    ("mnist_rotations", 1000, "--model eralg4 --lr 0.1 --memories 500 --replay_batch_size 5"),
    ("mnist_permutations", 1000, "--model eralg4 --lr 0.1 --memories 500 --replay_batch_size 10"),
    ("mnist_manypermutations", 200, "--model eralg4 --lr 0.1 --memories 500 --replay_batch_size 25"),
    ("mnist_rotations", 1000, "--model eralg4 --lr 0.1 --memories 200 --replay_batch_size 10"),
    ("mnist_permutations", 1000, "--model eralg4 --lr 0.1 --memories 200 --replay_batch_size 10"),
]


def lamaml_line(stream, n, memories, glances, rest, _):
    return LAMAML_COMMON.format(n=n, stream=stream) + " " + LAMAML_LINE.format(m=memories, g=glances, rest=rest)


def mer_line(stream, n, rest):
    return MER_COMMON.format(n=n, stream=stream) + " " + rest


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


@pytest.mark.parametrize("row", MER)
def test_mer_lines_mean_what_they_meant(row):
    config = configure(mer_line(*row).split())
    words = row[2].split()
    assert config.algorithm.name == {"online": "online", "eralg4": "er"}[words[1]]
    assert (config.dataset.name, config.run.batch_size, config.run.log_dir, config.run.device) == (
        row[0],
        1,
        "results/",
        "cpu",
    )
    assert (config.network.init, config.stream.samples_per_task) == ("xavier_uniform", row[1])
    assert config.learner.lr == float(words[3])
    if config.algorithm.name == "er":
        assert (config.learner.memories, config.learner.replay_batch_size) == (int(words[5]), int(words[7]))
        assert (config.learner.grad_clip_norm, config.learner.glances) == (0, 1)


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_lines_run(line, mnist_data, tmp_path):
    size = f"--samples_per_task 10 --n_tasks 2 --data_path {mnist_data} --log_dir {tmp_path}"
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


def test_sources_of_values_and_who_wins():
    config = configure("--model lamaml --dataset mnist_rotations".split())
    assert (config.learner.opt_lr, config.sources["opt_lr"]) == (0.3, "papers/lamaml.toml")
    assert config.seeds == (0, 1, 2, 3, 4)
    config = configure("--model lamaml --dataset mnist_rotations --as_published --opt_lr 0.2 --seed 3".split())
    assert (config.learner.opt_lr, config.sources["opt_lr"]) == (0.2, "command line")
    assert (config.learner.snapshot, config.sources["snapshot"]) == ("live", "--as_published")
    assert config.seeds == (3,)
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
    config = configure("-order random -inc 5 --workers 3 --loader task_incremental_loader --tf_dir x".split())
    assert len(config.notes) == 5 and all("has no effect" in note for note in config.notes)


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
        ("--evaluate_on validation", ["--validation 0.1"]),
        ("--evaluate_on train", ["--evaluate_on train", "test or validation"]),
        ("--validation 0.95", ["--validation 0.95", "0.9"]),
        ("--validation 0.0001", ["--validation 0.0001", "larger"]),
        ("--samples_per_task 4000", ["--samples_per_task 4000", "1198"]),
        ("--model online --log_alignment", ["--log_alignment", "online"]),
        ("--dataset mnist_rotations --data_path nowhere", ["nowhere", "get_data.py mnist"]),
        ("--log_dir /proc/nowhere", ["--log_dir /proc/nowhere", "writable"]),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(line, parts, refused):
    message = refused(line)
    assert all(part in message for part in parts), message


names = st.sampled_from([*ALGORITHMS, "eralg4", "nosuch"])
words = st.sampled_from(["0", "-1", "1", "0.5", "nan", "inf", "1e400", "", "yes", "relu", "all", "١٢"])
flags = st.sampled_from(
    [
        "lr",
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
