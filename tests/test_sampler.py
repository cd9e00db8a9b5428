"""Batches of training and of validation."""

import numpy as np
import pytest
from data_helpers import assert_one_line

from paci.data import (
    IGNORE_INDEX,
    Sampler,
    validation_batches,
)
from paci.errors import DataError

# Batches


def test_batch_is_windows_of_the_tokens() -> None:
    tokens = np.random.default_rng(0).permutation(1000).astype(np.uint16)
    inputs, targets = Sampler(tokens, context=16, batch_size=64, seed=1).batch(0)
    assert inputs.shape == targets.shape == (64, 16)
    assert inputs.dtype == targets.dtype == np.int64
    position = np.argsort(tokens)
    starts = position[inputs[:, 0]]
    assert np.array_equal(inputs, tokens[starts[:, None] + np.arange(16)])
    assert np.array_equal(targets, tokens[starts[:, None] + np.arange(1, 17)])


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.arange(60000, dtype=np.uint16)
    sampler = Sampler(tokens, context=4, batch_size=8, seed=7)
    in_order = [sampler.batch(step)[0] for step in range(50)]
    again = Sampler(tokens, context=4, batch_size=8, seed=7)
    for step in (49, 3, 3, 0):
        assert np.array_equal(again.batch(step)[0], in_order[step])
    # No step and no seed repeats the rows of another, shifted or not.
    rows = [row[0] for batch in in_order for row in batch]
    for seed in (0, 6, 8, 7 + 2**32, 2**64 - 1):
        other = Sampler(tokens, context=4, batch_size=8, seed=seed)
        rows += [row[0] for step in range(50) for row in other.batch(step)[0]]
    windows = {tuple(pair) for pair in np.lib.stride_tricks.sliding_window_view(rows, 2)}
    assert len(windows) == len(rows) - 1


def test_batch_is_pinned() -> None:
    """A checkpoint resumed on another machine must see the same text."""
    inputs, _ = Sampler(np.arange(1000, dtype=np.uint16), 2, batch_size=4, seed=5).batch(3)
    assert inputs[:, 0].tolist() == [946, 816, 646, 630]


def test_every_place_can_be_drawn() -> None:
    sampler = Sampler(np.arange(6, dtype=np.uint16), context=3, batch_size=200, seed=0)
    assert {row[0] for row in sampler.batch(0)[0]} == {0, 1, 2}
    assert sampler.batch(0)[1].max() == 5
    whole = Sampler(np.arange(4, dtype=np.uint16), context=3, batch_size=1, seed=0)
    assert whole.batch(9)[1].tolist() == [[1, 2, 3]]


def test_validation_windows_are_even_and_do_not_overlap() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    batches = list(validation_batches(tokens, context=10, batch_size=4, num_sequences=20))
    assert len(batches) == 5
    inputs = np.concatenate([x for x, _ in batches])
    targets = np.concatenate([y for _, y in batches])
    assert inputs[:, 0].tolist() == list(range(0, 1000, 50))
    assert np.array_equal(targets, inputs + 1)
    again = list(validation_batches(tokens, context=10, batch_size=4, num_sequences=20))
    assert np.array_equal(inputs, np.concatenate([x for x, _ in again]))
    exact = list(validation_batches(tokens[:30], context=10, batch_size=3, num_sequences=3))
    assert exact[0][0][:, 0].tolist() == [0, 10, 0]  # a third window would lack its last target
    uneven = validation_batches(tokens, context=10, batch_size=7, num_sequences=63)
    starts = np.concatenate([x[:, 0] for x, _ in uneven])
    assert len(starts) == 63
    assert set(np.diff(starts)) == {10, 20}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 50])
def test_the_size_of_a_batch_does_not_choose_the_windows(batch_size: int) -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    batches = list(validation_batches(tokens, 10, batch_size, num_sequences=20))
    assert {x.shape for x, _ in batches} == {(batch_size, 10)}
    known = [row for x, y in batches for row in x[(y != IGNORE_INDEX).all(axis=1)]]
    assert [row[0] for row in known] == list(range(0, 1000, 50))


def test_last_validation_batch_is_padded() -> None:
    tokens = np.arange(1, 32, dtype=np.uint16)  # 3 windows of 10
    batches = list(validation_batches(tokens, context=10, batch_size=2, num_sequences=10))
    assert [x.shape for x, _ in batches] == [(2, 10), (2, 10)]
    inputs = np.concatenate([x for x, _ in batches])
    targets = np.concatenate([y for _, y in batches])
    assert inputs.dtype == targets.dtype == np.int64
    assert targets[:3].flatten().tolist() == list(range(2, 32))
    assert IGNORE_INDEX == -100
    assert (targets[3] == -100).all()
    assert (inputs[3] == 0).all()


@pytest.mark.parametrize("num_tokens", [0, 10])
def test_corpus_shorter_than_a_window(num_tokens: int) -> None:
    tokens = np.zeros(num_tokens, dtype=np.uint16)
    with pytest.raises(DataError, match=f"context \\+ 1 = 11 tokens, got {num_tokens}") as error:
        Sampler(tokens, context=10, batch_size=1, seed=0)
    assert_one_line(error)
    with pytest.raises(DataError, match="context \\+ 1 = 11 tokens"):
        validation_batches(tokens, context=10, batch_size=1, num_sequences=1)


def test_numbers_out_of_range() -> None:
    tokens = np.zeros(100, dtype=np.uint16)
    for arguments in ((0, 1, 0), (1, 0, 0), (1, 1, -1), (1, 1, 2**64)):
        with pytest.raises(DataError) as error:
            Sampler(tokens, *arguments)
        assert_one_line(error)
    with pytest.raises(DataError, match="step must be"):
        Sampler(tokens, 1, 1, 0).batch(-1)
    for arguments in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(DataError, match="at least 1, got 0"):
            validation_batches(tokens, *arguments)
