"""MQAR: what its rows hold, and that a dictionary answers all of it."""

import numpy as np
import pytest

from nl_jax.tasks import recall

ROWS, LENGTH, PAIRS, VOCAB = 300, 32, 5, 64


def draw(seed=0, **more):
  rng = np.random.default_rng(seed)
  return recall.mqar(rng, ROWS, LENGTH, PAIRS, VOCAB, **more)


def test_the_seed_decides():
  for name, x in draw(3).items():
    np.testing.assert_array_equal(x, draw(3)[name])
  assert np.any(draw(3)["inputs"] != draw(4)["inputs"])


@pytest.mark.parametrize("random_non_queries", [False, True])
def test_a_dictionary_answers_every_query(random_non_queries):
  batch = draw(random_non_queries=random_non_queries)
  for inputs, targets, weights in zip(
    batch["inputs"], batch["targets"], batch["weights"]
  ):
    prefix = inputs[: 2 * PAIRS]
    told = dict(zip(prefix[::2], prefix[1::2]))
    asked = np.flatnonzero(weights)
    assert sorted(inputs[asked]) == sorted(told)  # Each key once.
    assert all(at >= 2 * PAIRS and at % 2 == 0 for at in asked)
    assert [told[key] for key in inputs[asked]] == list(targets[asked])


def test_keys_and_values_are_distinct_and_of_their_halves():
  batch = draw()
  keys = batch["inputs"][:, 0 : 2 * PAIRS : 2]
  values = batch["inputs"][:, 1 : 2 * PAIRS : 2]
  assert keys.min() >= 1 and keys.max() < VOCAB // 2 <= values.min()
  assert values.max() < VOCAB
  for some in (keys, values):
    assert all(len(set(row)) == PAIRS for row in some)
  # Every id is used: none is out of reach at either end.
  assert set(keys.ravel()) == set(range(1, VOCAB // 2))
  assert set(values.ravel()) == set(range(VOCAB // 2, VOCAB))


def test_what_stands_between_queries():
  plain, noisy = draw(), draw(random_non_queries=True)
  rest = (plain["weights"] == 0) & (np.arange(LENGTH) >= 2 * PAIRS)[None]
  assert not plain["inputs"][rest].any()
  assert len(set(noisy["inputs"][noisy["weights"] == 0])) == VOCAB


def test_slots_follow_the_power_law():
  # The first key's slot is drawn with the weights themselves.
  rng = np.random.default_rng(0)
  drawn = recall._slots(rng, 20_000, 8, 3)
  assert all(len(set(row)) == 3 for row in drawn)
  weights = 0.01 * np.arange(1, 9) ** (0.01 - 1)
  share = np.bincount(drawn[:, 0], minlength=8) / len(drawn)
  np.testing.assert_allclose(share, weights / weights.sum(), atol=0.015)


@pytest.mark.parametrize(
  "length, pairs, vocab_size, wanted",
  [
    (31, 4, 64, "an even length of at least 16 tokens, got 31"),
    (32, 9, 64, "an even length of at least 36 tokens, got 32"),
    (32, 4, 32, "a vocabulary of at least 33 ids, got 32"),
  ],
)
def test_sizes_that_do_not_fit(length, pairs, vocab_size, wanted):
  rng = np.random.default_rng(0)
  with pytest.raises(ValueError, match=wanted):
    recall.mqar(rng, 2, length, pairs, vocab_size)
