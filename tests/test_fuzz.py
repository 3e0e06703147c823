"""Random command lines made of all options: each ends in a run or in one sentence that names an option, never else."""

import math
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataloaders.registry import DATASETS
from main import main
from model.registry import ALGORITHMS, ALIASES
from utils.config import ACTIONS, RETIRED, SPECIAL, _known_options, configure

#: What takes no time to run; given last. What is larger is only configured.
SMALL = "--time_limit 0.004 --n_hiddens 8 --data_path nowhere --device cpu".split()
LARGEST = {"n_tasks": 12, "memories": 10**4, "n_memories": 10**3, "replay_batch_size": 10**3, "batch_size": 10**3}
LARGEST |= {"train_mc_iters": 50, "n_layers": 20, "threads": 4}

NUMBERS = "nan inf -inf 1e999 -1 -0.5 0 1 2 3 0.5 1e-9 1e30 99999999999999999999 ١٢ 0x10 1,5".split()
WORDS = "yes no maybe None ../.. %s -- - relu all auto".split()
JUNK = st.sampled_from([*NUMBERS, *WORDS, "", " ", "a b", "x" * 300])


def values_of(o) -> st.SearchStrategy:
    """Sound values, the edges of the range and what lies beyond, and what is none at all."""
    if o.choices:
        return st.sampled_from(o.choices) | JUNK
    edges = [edge for edge in (o.low, o.high, o.above) if edge is not None]
    near = [edge + by for edge in edges for by in (-1, 0, 1)] + [math.nextafter(edge, math.inf) for edge in edges]
    numbers = st.integers(0, 5) if o.kind is int else st.floats(0, 2)
    sound = {bool: st.sampled_from(["yes", "no"]), str: st.sampled_from([str(o.default), "x"])}.get(o.kind, numbers)
    return (sound | st.sampled_from(near or [0])).map(str) | JUNK


KNOWN = _known_options()
PAIRS = st.one_of(
    *(st.tuples(st.just(flag), values_of(o)) for o in KNOWN.values() for flag in (o.name, *o.flags)),
    *(st.tuples(st.just(name), JUNK) for name in (*SPECIAL, *RETIRED, "nosuch", "lrr", "model_")),
    st.tuples(st.sampled_from([*ACTIONS, "help"]), st.none()),
    st.tuples(st.sampled_from([*KNOWN, *SPECIAL]), st.none()),
)


@st.composite
def command_lines(draw):
    """A model and a stream, mostly options that they take, and anything else."""
    model, dataset = draw(st.sampled_from([*ALGORITHMS, *ALIASES])), draw(st.sampled_from(list(DATASETS)))
    line = ["--model", model, "--dataset", dataset] if draw(st.booleans()) else []
    own = [o for o in KNOWN.values() if o.name in typing.get_type_hints(ALGORITHMS[ALIASES.get(model, model)].options)]
    pairs = draw(st.lists(PAIRS, max_size=3))
    for o in draw(st.lists(st.sampled_from(own), max_size=3)):
        pairs.append((o.name, draw(values_of(o))))
    for flag, value in draw(st.permutations(pairs)):
        line += (
            [f"--{flag}"] if value is None else [f"--{flag}={value}"] if draw(st.booleans()) else [f"--{flag}", value]
        )
    return line


def is_small(line: list[str]) -> bool:
    """Whether the configuration can be run in passing."""
    try:
        values = configure(line).values
    except (Exception, SystemExit):
        return True  # main refuses it, or prints and stops
    return all(values.get(name, 0) <= largest for name, largest in LARGEST.items())


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a time limit may end within a finaliser
@settings(
    deadline=None, max_examples=500, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(line=command_lines())
def test_every_command_line_runs_or_is_refused_by_name(line, tmp_path, capsys, monkeypatch, quick_plots):
    monkeypatch.chdir(tmp_path)
    drawn, line = line, [*line, *SMALL]
    if not is_small(line):
        return
    capsys.readouterr()
    try:
        code = main(line).exit_code
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code in (0, 2, 3, 143), (line, said)
    if code == 2:
        (refusal,) = [text for text in said.splitlines() if text.startswith("main.py: ")]
        assert refusal.endswith((".", ").")), line
        if "is not a flag and follows none" not in refusal:
            assert any(part in refusal for part in [*flags_in(drawn), "--data_path nowhere"]), (drawn, refusal)


def flags_in(line: list[str]) -> list[str]:
    """The flags of the line, by every name they have."""
    given_flags = [part.partition("=")[0] for part in line if part.startswith("--")]
    names = {f"--{flag}": o.name for o in KNOWN.values() for flag in o.flags}
    return [*given_flags, *(f"--{names[flag]}" for flag in given_flags if flag in names)]


@pytest.mark.parametrize("script", ["get_data.py", "utils.tables", "run_experiments.sh"])
@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(JUNK | st.sampled_from(["--source", "--nosuch", "keep", "mnits", "lamamml"]), min_size=1, max_size=3)
)
def test_the_other_scripts_refuse_in_one_sentence_too(script, words, tmp_path, capsys, monkeypatch):
    import get_data
    from utils import experiments, tables
    from utils.command_line import one_sentence

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "_run", lambda line: 0)
    monkeypatch.setattr(tables.atomic, "write_text", lambda path, text: None)
    capsys.readouterr()
    run = {"get_data.py": get_data.main, "utils.tables": tables.main, "run_experiments.sh": experiments.main}[script]
    try:
        with one_sentence(script):
            run(words)
    except SystemExit as stop:
        said = capsys.readouterr().err
        assert stop.code in (0, 2), (words, said)
        assert stop.code == 0 or (said.startswith(f"{script}: ") and said.count("\n") == 1), (words, said)
