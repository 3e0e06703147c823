import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from model.batch import Batch
from model.memory import Reservoir, TaskRings
from utils.random_streams import RandomStreams


def numbered(start, n, replicas=1):
    """Examples whose x and y are their number in the stream."""
    y = torch.arange(start, start + n).expand(replicas, n)
    return Batch.of(y[:, :, None].float(), y, y % 7)


def filled(capacity, total, seed, batch=10, **options):
    memory = Reservoir(capacity, RandomStreams([seed]), **options)
    for start in range(0, total, batch):
        memory.add(numbered(start, min(batch, total - start)))
    return memory


def kept(capacity, total, seeds, **options):
    """How often each example is in the memory at the end, over many seeds."""
    counts = np.zeros(total)
    for seed in range(seeds):
        counts[filled(capacity, total, seed, **options).stored.y[0].numpy()] += 1
    return counts


@pytest.mark.parametrize("batch", [1, 10, 33])
def test_every_example_is_kept_with_equal_probability(batch):
    assert stats.chisquare(kept(5, 40, 600, batch=batch)).pvalue > 1e-3


def test_the_inclusive_rule_favours_the_first_example():
    """With one slot and N examples the first stays with probability 2 / (N + 1), every other one with 1 / (N + 1)."""
    counts = kept(1, 10, 2200, rule="inclusive")
    assert stats.chisquare(counts, 200 * np.array([2, *[1] * 9])).pvalue > 1e-3
    assert stats.chisquare(counts).pvalue < 1e-3


def test_contents_are_examples_that_were_added_whole():
    stored = filled(20, 200, 0).stored
    assert torch.equal(stored.x[0, :, 0].long(), stored.y[0]) and torch.equal(stored.t[0], stored.y[0] % 7)
    assert len(set(stored.y[0].tolist())) == 20


@settings(deadline=None)
@given(
    st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from(["uniform", "inclusive"])
)
def test_a_reservoir_holds_what_was_added_whole_and_once_whatever_the_batches(capacity, batches, rule):
    memory, total = Reservoir(capacity, RandomStreams([0, 1]), rule=rule), 0
    for size in batches:
        memory.add(numbered(total, size, replicas=2))
        total += size
        assert len(memory) == min(total, capacity)
        for x, y, t in zip(*(part[:, : len(memory)] for part in memory.stored), strict=True):
            assert len(set(y.tolist())) == len(y) and y.max() < total
            assert torch.equal(x[:, 0].long(), y) and torch.equal(t, y % 7)
        drawn = memory.sample(3)
        assert torch.equal(drawn.x[:, :, 0].long(), drawn.y) and torch.equal(drawn.t, drawn.y % 7)


def test_replicas_fill_as_they_would_alone():
    packed = Reservoir(8, RandomStreams([3, 4]))
    for start in range(0, 60, 6):
        packed.add(numbered(start, 6, replicas=2))
    for replica, seed in enumerate((3, 4)):
        assert torch.equal(packed.stored.y[replica], filled(8, 60, seed, batch=6).stored.y[0])


def test_draws_are_uniform_over_what_is_held():
    memory = filled(10, 10, 0)
    counts = np.zeros(10)
    for _ in range(2000):
        drawn = memory.sample(3).y[0].tolist()
        assert len(set(drawn)) == 3
        counts[drawn] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_with_replacement_an_example_can_come_twice():
    memory = filled(3, 3, 0, replacement=True)
    assert any(len(set(memory.sample(3).y[0].tolist())) < 3 for _ in range(20))


def test_no_more_is_drawn_than_is_held_and_nothing_from_an_empty_memory():
    memory = Reservoir(10, RandomStreams([0]))
    assert memory.sample(5) is None and len(memory) == 0
    memory.add(numbered(0, 4))
    assert memory.sample(10).size == 4 and memory.sample(0) is None


def test_drawing_more_does_not_change_what_is_kept():
    eager, idle = (Reservoir(8, RandomStreams([0])) for _ in range(2))
    for start in range(0, 60, 6):
        eager.sample(4)
        for memory in (eager, idle):
            memory.add(numbered(start, 6))
    assert torch.equal(eager.stored.y, idle.stored.y)


def test_a_frozen_memory_draws_from_what_was_held_then():
    memory = filled(50, 30, 0)
    memory.freeze()
    memory.add(numbered(100, 20))
    assert len(memory) == 50
    assert all(memory.sample(10).y.max() < 30 for _ in range(20))
    memory.thaw()
    assert any(memory.sample(10).y.max() >= 100 for _ in range(20))


def test_a_memory_of_none_stays_empty():
    memory = Reservoir(0, RandomStreams([0]))
    memory.add(numbered(0, 4))
    assert memory.sample(3) is None


@pytest.mark.parametrize("batch", [1, 3, 10, 25])
def test_rings_hold_the_last_examples_of_every_task_whatever_the_batch(batch):
    rings = TaskRings(10)
    sizes = {4: 23, 0: 7, 2: 40}
    for t, total in sizes.items():
        for start in range(0, total, batch):
            rings.add(t, numbered(100 * t + start, min(batch, total - start), replicas=2))
    for t, total in sizes.items():
        expected = list(range(100 * t + max(0, total - 10), 100 * t + total))
        held = rings.of(t)
        assert [sorted(row.tolist()) for row in held.y] == [expected] * 2
        assert torch.equal(held.x[:, :, 0].long(), held.y)
    assert [rings.filled(t) for t in (4, 0, 2)] == [10, 7, 10]


def test_rings_tell_what_came_before_with_the_weight_of_each_example():
    rings = TaskRings(4)
    assert rings.before(0) is None
    rings.add(0, numbered(0, 6))
    assert rings.before(0) is None
    rings.add(1, numbered(10, 2))
    found = rings.before(1)
    assert found.tasks == [0] and found.shares.tolist() == [0.25] * 4
    assert sorted(found.batch.y[0].tolist()) == [2, 3, 4, 5]
    found = rings.before(2)
    assert found.tasks == [0, 1] and found.shares.tolist() == [0.25] * 4 + [0.5, 0.5, 0, 0]
    assert found.batch.y[0, 4:6].tolist() == [10, 11] and found.written.tolist() == [0, 1, 2, 3, 4, 5]
    rings.add(1, numbered(12, 1))
    assert rings.before(2).batch.y[0, 4:7].tolist() == [10, 11, 12]
    found = rings.before(2, skip=1)
    assert (found.tasks, found.size) == ([1], 3) and rings.before(1, skip=1) is None


def test_rings_larger_than_a_task_cost_nothing_more():
    rings = TaskRings(1000)
    rings.add(0, numbered(0, 6))
    assert rings.before(1).size == 6


def test_rings_are_restored_whole():
    rings, other = TaskRings(4), TaskRings(4)
    rings.add(3, numbered(0, 6))
    other.load_state_dict(rings.state_dict())
    for memory in (rings, other):
        memory.add(3, numbered(6, 3))
        memory.add(5, numbered(20, 1))
    assert torch.equal(rings.before(9).batch.y, other.before(9).batch.y) and rings.seen == other.seen
    with pytest.raises(ValueError, match="holds 4 examples per task, expected 5"):
        TaskRings(5).load_state_dict(rings.state_dict())


@pytest.mark.parametrize("held", [12, 40])
def test_draws_in_random_order_are_in_random_order_also_when_everything_is_drawn(held):
    memory, places = filled(held, held, 0), np.zeros(12)
    for _ in range(1200):
        drawn = memory.sample(12, in_random_order=True).y[0].tolist()
        assert len(set(drawn)) == 12
        if held - 1 in drawn:
            places[drawn.index(held - 1)] += 1
    assert stats.chisquare(places).pvalue > 1e-3
