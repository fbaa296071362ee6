"""Trains a model on labelled rows and tests it on others as it learns.

The step and the optimizer are those of `experiments.lm`. A model is anything
with `init`, `apply`, `levels` and `cms` of `nl_jax.models.lm`. One device; a
run has no checkpoints: it is minutes, and what is kept of it is its result.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax.tasks import batches
from nl_jax.train import optimizer as optimizer_lib
from nl_jax.train import step as step_lib

_WARMUP = 0.1  # Of the steps.
_MIN_RATIO = 0.1


class Plan(NamedTuple):
  """How a model is trained.

  Attributes:
    steps: updates, at most.
    batch_size: rows of a step.
    learning_rate: peak; a tenth of the steps warm up, then half a cosine.
    eval_every: steps between two tests.
    weight_decay, b2, eps: AdamW's.
    clip_norm: of the gradient.
  """

  steps: int
  batch_size: int
  learning_rate: float
  eval_every: int
  weight_decay: float = 0.0
  b2: float = 0.95
  eps: float = 1e-8
  clip_norm: float = 1.0


class Fit(NamedTuple):
  """A trained model.

  Attributes:
    params: after the last step.
    history: {"step", "loss", then for each test "<test>/position",
      "<test>/sequence" and "<test>/loss"}, a row a test.
  """

  params: Any
  history: list[dict[str, float]]


def fit(
  net: Any,
  train: batches.Batch,
  tests: Mapping[str, batches.Batch],
  plan: Plan,
  *,
  seed: int,
  done: Callable[[list[dict[str, float]]], bool],
) -> Fit:
  """Trains until the steps are over or `done` says so.

  Args:
    net: the model.
    train: rows to learn from, in a new order each epoch.
    tests: rows to be tested on, by name.
    plan: how.
    seed: of the weights and of the order of the rows.
    done: history -> whether to stop.

  Raises:
    ValueError: fewer rows than a batch.
    FloatingPointError: the loss is not finite.
  """
  rows, length = train["inputs"].shape
  if rows < plan.batch_size:
    raise ValueError(
      f"a batch of {plan.batch_size} rows needs as many to learn from, got "
      f"{rows}"
    )
  optimizer = _optimizer(net, plan, plan.batch_size * length)
  state = _start(net, optimizer, seed)
  make = step_lib.make(net, optimizer.tx, optimizer.schedule, optimizer.labels)
  step, test = jax.jit(make, donate_argnums=0), _tester(net)
  order = _order(rows, plan.batch_size, np.random.default_rng(seed))
  history: list[dict[str, float]] = []
  for i in range(1, plan.steps + 1):
    state, metrics = step(state, batches.take(train, next(order)))
    if i % plan.eval_every and i != plan.steps:
      continue
    loss = float(metrics["train/loss"])
    if not np.isfinite(loss) or int(metrics["skipped"]):
      raise FloatingPointError(
        f"the loss is not finite by step {i}; lower --learning_rates"
      )
    row = {"step": i, "loss": loss}
    for name, batch in tests.items():
      measured = test(state["params"], batch, plan.batch_size)
      row |= {f"{name}/{key}": value for key, value in measured.items()}
    history.append(row)
    if done(history):
      break
  return Fit(state["params"], history)


def _optimizer(
  net: Any, plan: Plan, tokens_per_step: int
) -> optimizer_lib.Optimizer:
  return optimizer_lib.make(
    net,
    steps=plan.steps,
    tokens_per_step=tokens_per_step,
    learning_rate=plan.learning_rate,
    warmup_steps=max(1, int(_WARMUP * plan.steps)),
    weight_decay=plan.weight_decay,
    clip_norm=plan.clip_norm,
    min_ratio=_MIN_RATIO,
    options={"b2": plan.b2, "eps": plan.eps},
  )


def _start(
  net: Any, optimizer: optimizer_lib.Optimizer, seed: int
) -> dict[str, Any]:
  @jax.jit
  def start(key: jax.Array) -> dict[str, Any]:
    params = net.init(key)
    zero = jnp.zeros((), jnp.int32)
    opt = optimizer.tx.init(params)
    return {"params": params, "opt": opt, "step": zero, "skipped": zero}

  return start(jax.random.key(seed))


def _order(
  rows: int, batch_size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
  """Row numbers of batch after batch; an epoch's last ones are left out."""
  while True:
    permuted = rng.permutation(rows)
    for i in range(0, rows - batch_size + 1, batch_size):
      yield permuted[i : i + batch_size]


def _tester(net: Any) -> Callable[..., dict[str, float]]:
  """(params, batch, rows at once) -> accuracies and loss."""

  @jax.jit
  def predict(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    logits, _, _ = net.apply(
      params, batch["inputs"], segment_ids=batch["segment_ids"]
    )
    nats = step_lib.cross_entropy(logits, batch["targets"])
    return jnp.argmax(logits, -1), jnp.sum(nats * batch["weights"])

  def test(params: Any, batch: batches.Batch, at_once: int) -> dict[str, float]:
    rows, total, predictions = len(batch["inputs"]), 0.0, []
    # Whole batches alone, so that one shape is compiled: the last is filled
    # with rows that ask for nothing.
    filled = {
      name: np.pad(x, ((0, -rows % at_once), (0, 0)))
      for name, x in batch.items()
    }
    for i in range(0, rows, at_once):
      part = batches.take(filled, np.arange(i, i + at_once))
      some, nats = predict(params, part)
      predictions.append(np.asarray(some))
      total += float(nats)
    predicted = np.concatenate(predictions)[:rows]
    return {
      "position": batches.position_accuracy(predicted, batch),
      "sequence": batches.sequence_accuracy(predicted, batch),
      "loss": total / float(batch["weights"].sum()),
    }

  return test
