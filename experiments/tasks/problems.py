"""What is learned and tested in recall and languages: data, sizes, verdicts.

Sizes: `smoke` is a test of the machinery, `small` what a CPU can do, `paper`
the settings of the sources.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks import training
from nl_jax.tasks import batches, languages, recall

MQAR = "mqar"
SMOKE, SMALL, PAPER = "smoke", "small", "paper"
PRESETS = (SMOKE, SMALL, PAPER)
SOLVED = 0.99  # Of MQAR: training stops (Zoology).
_SURE = 1e-3  # Nats a class at which a perfect Bin 0 is believed.
_PART = 1000  # Rows of MQAR that are drawn at once.


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much of a problem, and how it is learned.

  Attributes:
    train: rows to learn from; of MQAR for each number of pairs.
    test: rows of a test, at most.
    steps, batch_size, eval_every: of `training.Plan`.
    learning_rates: each is a trial of its own; the table shows the best.
    seeds: how many.
    vocab_size, lengths, pairs: of MQAR; the first length is trained, all are
      tested, with every number of pairs that fits.
  """

  train: int
  test: int
  steps: int
  batch_size: int
  eval_every: int
  learning_rates: tuple[float, ...] = (3e-3,)
  seeds: int = 1
  vocab_size: int = 0
  lengths: tuple[int, ...] = ()
  pairs: tuple[int, ...] = ()

  def __post_init__(self):
    least = dict(train=1, test=1, steps=1, batch_size=1, eval_every=1, seeds=1)
    for name, bound in least.items():
      if getattr(self, name) < bound:
        raise ValueError(
          f"--{name} must be at least {bound}, got {getattr(self, name)}"
        )
    if not self.learning_rates or min(self.learning_rates) <= 0:
      raise ValueError(
        f"--learning_rates must be above 0, got {self.learning_rates}"
      )


_GRID = (3e-4, 1e-3, 3e-3)
_LANGUAGES = {
  SMOKE: Sizes(train=128, test=16, steps=8, batch_size=16, eval_every=4),
  SMALL: Sizes(10_000, 200, 1000, 32, 100),
  # 300 epochs.
  PAPER: Sizes(10_000, 2000, 46_800, 64, 780, _GRID, seeds=3),
}
_MQAR = {
  SMOKE: Sizes(
    20_000, 500, 2000, 64, 100, vocab_size=64, lengths=(32,), pairs=(4,)
  ),
  SMALL: Sizes(
    20_000, 500, 2000, 64, 100,
    vocab_size=128, lengths=(32, 64), pairs=(4,),
  ),
  # Zoology's Figure 2, its first setting; give the others by flags.
  PAPER: Sizes(
    100_000, 3000, 12_480, 512, 195, (1e-4, 4.6e-4, 2.2e-3, 1e-2), seeds=3,
    vocab_size=8192, lengths=(64,), pairs=(4,),
  ),
}  # fmt: skip


# Of needles that a model learns from scratch: none of the sources does.
NEEDLES = Sizes(4000, 100, 2000, 16, 100)


class Problem(NamedTuple):
  """Rows to learn from and to be tested on.

  Attributes:
    train: a batch.
    tests: batches by name.
    vocab_size: ids of inputs and labels.
  """

  train: batches.Batch
  tests: dict[str, batches.Batch]
  vocab_size: int


def sizes(task: str, preset: str) -> Sizes:
  """The sizes of a task in a preset."""
  return (_MQAR if task == MQAR else _LANGUAGES)[preset]


def make(task: str, size: Sizes) -> Problem:
  """The rows of a task; they are the same for every seed of a model.

  Args:
    task: MQAR, or a key of `languages.LANGUAGES`.
    size: how many.
  """
  if task == MQAR:
    return _mqar(size)
  rows = languages.splits(
    task, np.random.default_rng(0), train=size.train, test=size.test
  )
  train = rows.pop("train")
  return Problem(train, rows, languages.LANGUAGES[task].vocab_size)


def _mqar(size: Sizes) -> Problem:
  trained, *_ = size.lengths
  draw = lambda rng, rows, length, pairs: recall.mqar(
    rng, rows, length, pairs, size.vocab_size
  )
  rng = np.random.default_rng(0)
  train = [
    draw(rng, min(_PART, size.train - i), trained, n)
    for n in size.pairs
    for i in range(0, size.train, _PART)
  ]
  tests = {
    mqar_test(length, n): draw(
      np.random.default_rng([1, length, n]), size.test, length, n
    )
    for length, n in settings(size)
  }
  return Problem(batches.joined(train), tests, size.vocab_size)


def settings(size: Sizes) -> list[tuple[int, int]]:
  """(length, pairs) of the tests of MQAR."""
  return [(t, n) for t in size.lengths for n in size.pairs if 4 * n <= t]


def mqar_test(length: int, pairs: int) -> str:
  """The name of a test of MQAR."""
  return f"{pairs} in {length}"


def plan(task: str, size: Sizes, learning_rate: float) -> training.Plan:
  """How a model is trained for a task."""
  common = (size.steps, size.batch_size, learning_rate, size.eval_every)
  if task not in languages.LANGUAGES:
    return training.Plan(*common, weight_decay=0.1)
  # Irie et al.: Adam (0.9, 0.995), 1e-9. Deviation: gradients are clipped and
  # the rate falls, as in all our training.
  return training.Plan(*common, b2=0.995, eps=1e-9)


def done(task: str, size: Sizes, history: list[dict[str, float]]) -> bool:
  """Whether nothing that is reported can change any more."""
  last = history[-1]
  if task == MQAR:
    trained = [n for t, n in settings(size) if t == size.lengths[0]]
    names = [mqar_test(size.lengths[0], n) for n in trained]
    return all(last[f"{name}/position"] > SOLVED for name in names)
  return last["bin1/sequence"] == 1 and _sure(history) is not None


def on_bin0(history: list[dict[str, float]]) -> Mapping[str, Any]:
  """The honest choice among the tests of a run: Bin 1 plays no part in it.

  The first test with a perfect Bin 0 and a loss below 0.001 nat; of a run
  without one the best Bin 0, of equals that of the lowest loss.
  """
  sure = _sure(history)
  if sure is not None:
    return sure
  return max(history, key=lambda h: (h["bin0/sequence"], -h["bin0/loss"]))


def on_bin1(history: list[dict[str, float]]) -> Mapping[str, Any]:
  """The choice of the published tables: best Bin 1, of equals best Bin 0."""
  order = lambda h: (h["bin1/sequence"], h["bin0/sequence"], -h["step"])
  return max(history, key=order)


def _sure(history: list[dict[str, float]]) -> Mapping[str, Any] | None:
  sure = (
    h for h in history if h["bin0/sequence"] == 1 and h["bin0/loss"] < _SURE
  )
  return next(sure, None)
