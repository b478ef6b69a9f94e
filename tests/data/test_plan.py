import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.data.plan import Epochs, Plan, apportion
from muser_dist.errors import ConfigError

SHARD_ROWS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum)
SOURCES = st.lists(st.tuples(SHARD_ROWS, st.integers(1, 9)), min_size=2, max_size=4)
BATCH = 48  # at least a row for each source, whatever the weights


@given(SHARD_ROWS, st.integers(0, 5), st.integers(1, 4))
def test_each_epoch_holds_each_row_once(rows, seed, window):
    plan = Plan([np.array(rows)], [1.0], 4, seed, window, shuffle=True)
    for epoch in range(3):
        part = plan.rows(epoch * plan.total, (epoch + 1) * plan.total)
        assert sorted(part.index.tolist()) == list(range(plan.total))
        assert (part.epoch == epoch).all()
        np.testing.assert_array_equal(plan.first[part.shard] + part.row, part.index)
        assert (part.row < np.array(rows)[part.shard]).all()


@given(SHARD_ROWS, st.data())
def test_any_stretch_is_found_without_the_ones_before(rows, data):
    plan = Plan([np.array(rows)], [1.0], 4, 7, 2, shuffle=True)
    whole = plan.rows(0, 3 * plan.total)
    start = data.draw(st.integers(0, 3 * plan.total))
    stop = data.draw(st.integers(start, 3 * plan.total))
    fresh = Plan([np.array(rows)], [1.0], 4, 7, 2, shuffle=True)
    if start < stop:
        np.testing.assert_array_equal(fresh.rows(start, stop).index, whole.index[start:stop])


def test_epochs_windows_and_seeds_differ():
    rows = np.full(10, 20)
    plan = Plan([rows], [1.0], 4, 0, 2, shuffle=True)
    first, second = plan.rows(0, 200).index, plan.rows(200, 400).index
    assert (first != second).any()
    assert (first != Plan([rows], [1.0], 4, 1, 2, shuffle=True).rows(0, 200).index).any()
    # Rows mix inside a window of two shards, and only there.
    assert len(set((first[:40] // 20).tolist())) == 2
    assert len(set((first[:20] // 20).tolist())) == 2


def test_one_pass_in_order_ends_in_padding():
    part = Plan([np.array([2, 3])], [1.0], 4, 0, 4, shuffle=False).rows(3, 8)
    assert part.index.tolist() == [3, 4, -1, -1, -1]
    assert part.shard.tolist() == [1, 1, -1, -1, -1]
    assert part.row.tolist() == [1, 2, -1, -1, -1]


@given(st.integers(0, 2**31), st.integers(0, 10), st.integers(0, 10))
@settings(max_examples=20)
def test_random_choices_of_a_row_are_its_own(seed, epoch, row):
    plan = Plan([np.array([20])], [1.0], 4, seed, 1, shuffle=True)
    assert plan.rng(epoch, row).random() == plan.rng(epoch, row).random()
    assert plan.rng(epoch, row).random() != plan.rng(epoch + 1, row).random()
    assert plan.rng(epoch, row).random() != plan.rng(epoch, row + 1).random()


def mixed(sources, seed=3) -> Plan:
    return Plan(
        [np.array(rows) for rows, _ in sources], [weight for _, weight in sources], BATCH, seed, 2, shuffle=True
    )


@given(SOURCES)
def test_every_batch_holds_the_sources_in_proportion_to_their_weights(sources):
    plan = mixed(sources)
    total = sum(weight for _, weight in sources)
    counts = np.zeros(len(sources))
    for step in range(12):
        part = plan.rows(step * BATCH, (step + 1) * BATCH)
        of_step = np.bincount(part.source, minlength=len(sources))
        counts += of_step
        for number, (_, weight) in enumerate(sources):
            assert abs(of_step[number] - BATCH * weight / total) < 2
            assert (
                abs(counts[number] - (step + 1) * BATCH * weight / total) < 1
            )  # what one step rounds, the next repairs


@given(SOURCES)
def test_each_source_goes_through_its_epochs(sources):
    plan = mixed(sources)
    part = plan.rows(0, 10 * BATCH)
    first_of_source = np.cumsum([0] + [sum(rows) for rows, _ in sources])
    for number, (rows, _) in enumerate(sources):
        own = part.source == number
        total = sum(rows)
        np.testing.assert_array_equal(np.sort(part.epoch[own]), np.arange(own.sum()) // total)
        for epoch in range(own.sum() // total):
            indices = part.index[own & (part.epoch == epoch)]
            assert sorted(indices.tolist()) == list(range(first_of_source[number], first_of_source[number + 1]))
    np.testing.assert_array_equal(plan.first[part.shard] + part.row, part.index)


@given(SOURCES, st.integers(0, 500), st.integers(1, 200))
def test_any_stretch_of_a_mixture_is_found_without_the_ones_before(sources, start, length):
    whole = mixed(sources).rows(0, start + length)
    part = mixed(sources).rows(start, start + length)
    np.testing.assert_array_equal(part.index, whole.index[start:])
    np.testing.assert_array_equal(part.epoch, whole.epoch[start:])


def test_sources_are_mixed_inside_a_batch():
    plan = mixed([([50], 1), ([50], 1)])
    assert len(set(plan.rows(0, 16).source.tolist())) == 2
    assert plan.rows(0, BATCH).source.tolist() != plan.rows(BATCH, 2 * BATCH).source.tolist()


def test_a_weight_of_less_than_a_row_is_refused():
    with pytest.raises(ConfigError, match="less than one row in a global batch of 48"):
        mixed([([5], 1), ([5], 1000)])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 10**9))
def test_largest_remainders(weights, total):
    from fractions import Fraction

    shares = apportion([Fraction(weight, sum(weights)) for weight in weights], total)
    assert sum(shares) == total
    assert all(abs(share - total * weight / sum(weights)) < 1 for share, weight in zip(shares, weights, strict=True))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.sampled_from([0.01, 0.1, 0.25, 0.5, 1.0]),
    st.integers(1, 4),
    st.integers(0, 50),
)
@settings(max_examples=60)
def test_a_share_of_the_rows_comes_once_in_each_pass_and_is_always_the_same(rows, share, window, seed):
    epochs = Epochs(np.array(rows), seed, 0, window, shuffle=True, share=share)
    assert share * epochs.total <= epochs.length < share * epochs.total + 1
    passes = [epochs.at(p * epochs.length, (p + 1) * epochs.length) for p in (0, 3)]
    assert [set(epoch) for epoch, _ in passes] == [{0}, {3}]
    first, later = (np.sort(index) for _, index in passes)
    assert len(np.unique(first)) == epochs.length
    np.testing.assert_array_equal(first, later)
    whole = Epochs(np.array(rows), seed, 0, 1, shuffle=True, share=share)  # whatever the windows
    np.testing.assert_array_equal(first, np.sort(whole.at(0, whole.length)[1]))
    more = Epochs(np.array(rows), seed, 0, window, shuffle=True, share=min(1.0, 2 * share))
    missing = set(first.tolist()) - set(more.at(0, more.length)[1].tolist())
    assert len(missing) <= len(rows)  # by rounding, one of a shard


def test_shares_of_several_sources_name_the_right_rows():
    plan = Plan([np.array([10, 10]), np.array([30])], [1, 1], 8, 3, 2, shuffle=True, share=0.5)
    rows = plan.rows(0, 400)
    for source, low, high, kept in ((0, 0, 20, 10), (1, 20, 50, 15)):
        index = rows.index[rows.source == source]
        assert low <= index.min() and index.max() < high and len(set(index.tolist())) == kept
