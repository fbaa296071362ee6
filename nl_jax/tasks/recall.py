"""Multi-query associative recall, MQAR (Arora et al., 2312.04927; Zoology).

    k_1 v_1 ... k_n v_n  then queries: keys again, each labelled with its value

Keys are distinct and of the lower half of the vocabulary, values distinct and
of the upper one. Queries stand at every second position; early ones are more
frequent, by a power law of their slot.
"""

import numpy as np

from nl_jax.tasks import batches

_POWER = 0.01  # a in the weight a (g + 1)^(a - 1) of slot g.


def mqar(
  rng: np.random.Generator,
  rows: int,
  length: int,
  pairs: int,
  vocab_size: int,
  *,
  random_non_queries: bool = False,
) -> batches.Batch:
  """Rows of MQAR.

  Args:
    rng: decides all.
    rows: N.
    length: T, an even number of tokens.
    pairs: n, keys of a row; 4 n are at most T.
    vocab_size: V; keys are of [1, V/2), values of [V/2, V).
    random_non_queries: fill the positions between queries with random ids
      instead of 0.

  Returns:
    A batch; the label of a query is at its own position.

  Raises:
    ValueError: sizes that do not fit each other.
  """
  _check(length, pairs, vocab_size)
  half = vocab_size // 2
  keys = 1 + _distinct(rng, rows, half - 1, pairs)
  values = half + _distinct(rng, rows, vocab_size - half, pairs)
  inputs = np.zeros((rows, length), np.int32)
  if random_non_queries:
    inputs[:, 2 * pairs :] = rng.integers(
      0, vocab_size, (rows, length - 2 * pairs)
    )
  inputs[:, 0 : 2 * pairs : 2] = keys
  inputs[:, 1 : 2 * pairs : 2] = values
  at = 2 * pairs + 2 * _slots(rng, rows, length // 2 - pairs, pairs)
  row = np.arange(rows)[:, None]
  inputs[row, at] = keys
  targets = np.zeros_like(inputs)
  targets[row, at] = values
  weights = np.zeros(inputs.shape, np.float32)
  weights[row, at] = 1
  return dict(
    inputs=inputs,
    targets=targets,
    weights=weights,
    segment_ids=np.ones_like(inputs),
  )


def _distinct(
  rng: np.random.Generator, rows: int, choices: int, count: int
) -> np.ndarray:
  """[rows,count] numbers below `choices`, no two alike in a row."""
  return np.argsort(rng.random((rows, choices)), axis=1)[:, :count]


def _slots(
  rng: np.random.Generator, rows: int, slots: int, count: int
) -> np.ndarray:
  """[rows,count] distinct slots, drawn one after the other by weight.

  The `count` largest of log-weights with Gumbel noise, in falling order, are a
  draw without replacement.
  """
  log_weights = (_POWER - 1) * np.log(np.arange(1, slots + 1))
  noisy = log_weights + rng.gumbel(size=(rows, slots))
  return np.argsort(-noisy, axis=1)[:, :count]


def _check(length: int, pairs: int, vocab_size: int) -> None:
  if length % 2 or pairs < 1 or 4 * pairs > length:
    raise ValueError(
      f"MQAR of {pairs} pairs needs an even length of at least {4 * pairs} "
      f"tokens, got {length}"
    )
  if vocab_size <= length or vocab_size // 2 - 1 < pairs:
    least = max(length + 1, 2 * pairs + 2)
    raise ValueError(
      f"MQAR of {pairs} pairs in {length} tokens needs a vocabulary of at "
      f"least {least} ids, got {vocab_size}"
    )
