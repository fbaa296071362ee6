"""One step: the loss, its gradient over micro-batches, one guarded update.

    loss = sum_bt w_bt (logsumexp(logits_bt) - logits_bt[target_bt]) / sum w

Everything the loop wants to know is reduced here, on the device.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from nl_jax import sharding
from nl_jax.models import lm
from nl_jax.train import carry as carry_lib
from nl_jax.train import state as state_lib

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Step = Callable[[state_lib.State, Batch], tuple[state_lib.State, Metrics]]

BATCH_DTYPES = {
  "inputs": np.int32,
  "targets": np.int32,
  "weights": np.float32,
  "segment_ids": np.int32,
}
# Field of a memory's Metrics -> name; sums there, means here.
_MEMORY = {
  "inner_loss": "inner_loss",
  "update_norm": "update_norm",
  "memory_norm": "memory_norm",
  "eta": "eta_mean",
  "alpha": "alpha_mean",
  "beta": "beta_mean",
}


def on_mesh(
  rows: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh, batch_size: int
) -> Batch:
  """A batch on the devices.

  Args:
    rows: this process's part of it (`data.pipeline`), whole rows.
    mesh: where to.
    batch_size: rows over all processes.
  """
  by_batch = sharding.batch_sharding(mesh)
  return {
    k: jax.make_array_from_process_local_data(
      by_batch,
      rows[k].astype(dtype, copy=False),
      (batch_size, rows[k].shape[1]),
    )
    for k, dtype in BATCH_DTYPES.items()
  }


@jax.named_scope("loss")
def cross_entropy(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
  """Nats of each target [B,T], in the logits' dtype."""
  target = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)
  return jax.nn.logsumexp(logits_BxTxV, axis=-1) - target[..., 0]


def loss_sum(
  params: Any, model: Any, batch: Batch
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
  """The weighted sum of cross-entropies, and (sum of weights, memory sums).

  Memory sums are over layers, rows and heads.
  """
  loss, more, _ = _loss_from(model, params, batch, None)
  return loss, more


def _loss_from(
  model: Any, params: Any, batch: Batch, memory: Any
) -> tuple[jax.Array, tuple[jax.Array, Any], Any]:
  """As `loss_sum`, from what `carry` keeps of a state on; and what after it."""
  given = () if memory is None else (carry_lib.full(model, params, memory),)
  logits, memory, metrics = model.apply(
    params, batch["inputs"], *given, segment_ids=batch["segment_ids"]
  )
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  losses = cross_entropy(logits, batch["targets"])
  weights = batch["weights"].astype(losses.dtype)
  sums = jax.tree.map(jnp.sum, metrics)
  after = carry_lib.kept(memory) if given else None
  return jnp.sum(weights * losses), (jnp.sum(weights), sums), after


def gradient(
  params: Any,
  model: Any,
  batch: Batch,
  accumulate: int,
  carried: carry_lib.Carried | None = None,
  rows: int = 1,
) -> tuple[jax.Array, Any, jax.Array, Any, carry_lib.Carried | None]:
  """Loss and gradient of a batch, taken in micro-batches.

  Sums of all micro-batches are divided by the weight of all, so that the
  result is the gradient of the batch however its weights are spread.

  Args:
    params: of the model.
    model: see `loss_sum`.
    batch: arrays [B,T].
    accumulate: number of micro-batches, a divisor of the streams.
    carried: what the streams of the batch carry; None: each row is read from
      an empty memory.
    rows: of each stream in the batch.

  Returns:
    loss, gradient, sum of weights, memory sums, what is carried on or None.
  """
  row = functools.partial(_loss_from, model)

  def loss(params: Any, part: Batch, carried: Any) -> tuple[jax.Array, Any]:
    if carried is None:
      total, more, _ = row(params, part, None)
      return total, (more, None)
    return carry_lib.read_on(row, params, dict(part), carried, rows)

  value_and_grad = jax.value_and_grad(loss, has_aux=True)

  def one(part: Batch, carried: Any) -> tuple[Any, Any]:
    (total, (more, carried)), grads = value_and_grad(params, part, carried)
    return (total, more, grads), carried

  if accumulate == 1:
    found, carried = one(batch, carried)
  else:
    parts = {k: _micro(x, accumulate, rows) for k, x in batch.items()}
    cut = None if carried is None else carry_lib.micro(carried, accumulate)
    xs = (parts, cut)
    zero = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(one, *jax.tree.map(lambda x: x[0], xs))[0],
    )

    def add(total: Any, x: Any) -> tuple[Any, Any]:
      found, carried = one(*x)
      return jax.tree.map(jnp.add, total, found), carried

    found, cut = jax.lax.scan(add, zero, xs)
    carried = None if cut is None else carry_lib.whole(cut)
  total, (weight, sums), grads = found
  scale = 1 / jnp.maximum(weight, 1)
  grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
  return total * scale, grads, weight, sums, carried


def _micro(x_BxT: jax.Array, accumulate: int, rows: int) -> jax.Array:
  """[B,T] to [accumulate, B / accumulate, T]; each device keeps its rows."""
  batch, length = x_BxT.shape
  shape = (batch // accumulate // rows, accumulate, rows, length)
  x = x_BxT.reshape(shape).swapaxes(0, 1).reshape(accumulate, -1, length)
  return sharding.constrain(x, None, "batch", "length")


def make(
  model: Any,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  labels: Callable[[Any], Any],
  *,
  accumulate: int = 1,
  carry_gradient: int = 1,
  max_skipped: int = 0,
) -> Step:
  """The step function (state, batch) -> (state, metrics), to be compiled.

  A step whose loss, gradient or update is not finite leaves parameters and
  optimizer as they were and adds one to `skipped`. Once `skipped` exceeds
  `max_skipped` nothing moves any more: the loop, which reads metrics one step
  late, finds the parameters of the step that went wrong.

  Args:
    model: see `loss_sum`.
    tx: the optimizer.
    schedule: for the metric of the learning rate.
    labels: params -> tree of level names; each gets an update norm.
    accumulate: micro-batches of a step.
    carry_gradient: rows of each stream in a batch, where the state carries
      memories: what gradients reach through.
    max_skipped: steps that may be skipped, over the whole run.
  """
  # Rows that are carried end at edges of all chunks.
  model = lm.at_edges(model)

  def step(
    state: state_lib.State, batch: Batch
  ) -> tuple[state_lib.State, Metrics]:
    params = state["params"]
    before = state.get(state_lib.CARRIED)
    loss, grads, weight, sums, after = gradient(
      params, model, batch, accumulate, before, carry_gradient
    )
    with jax.named_scope("optimizer"):
      updates, opt = tx.update(grads, state["opt"], params)
    grad_norm = optax.tree.norm(grads)
    update_norm = optax.tree.norm(updates)
    numbers = jnp.stack([loss, grad_norm, update_norm])
    finite = jnp.all(jnp.isfinite(numbers))
    ok = finite & (state["skipped"] <= max_skipped)
    keep = lambda new, old: jnp.where(ok, new, old)
    skipped = state["skipped"] + (1 - finite.astype(jnp.int32))
    metrics = {
      "train/loss": loss,
      "train/weight": weight,
      "opt/grad_norm": grad_norm,
      "opt/update_norm": update_norm,
      "opt/param_norm": optax.tree.norm(params),
      "opt/learning_rate": schedule(state["step"]),
      "skipped": skipped,
      **_level_norms(labels(params), updates),
      **memory_means(sums),
    }
    new = {
      "params": jax.tree.map(
        keep, optax.apply_updates(params, updates), params
      ),
      "opt": jax.tree.map(keep, opt, state["opt"]),
      "step": state["step"] + 1,
      "skipped": skipped,
    }
    if before is not None:
      new[state_lib.CARRIED] = jax.tree.map(keep, after, before)
    return new, metrics

  return step


def _level_norms(names: Any, updates: Any) -> Metrics:
  """opt/<label>/update_norm, where there is more than one label."""
  groups: dict[str, list[jax.Array]] = {}
  for name, update in zip(jax.tree.leaves(names), jax.tree.leaves(updates)):
    groups.setdefault(name, []).append(update)
  if len(groups) == 1:
    return {}
  return {
    f"opt/{name}/update_norm": optax.tree.norm(group)
    for name, group in groups.items()
  }


def memory_means(sums: Mapping[str, Any]) -> Metrics:
  """memory/<level>/<name>: sums over tokens divided by their count."""
  means = {}
  for level, metrics in sums.items():
    count = jnp.maximum(metrics.count, 1)
    for field, name in _MEMORY.items():
      means[f"memory/{level}/{name}"] = getattr(metrics, field) / count
  return means


def compiled(
  step: Step,
  like: state_lib.State,
  mesh: jax.sharding.Mesh,
  batch_size: int,
  sequence_length: int,
) -> Step:
  """Compiles the step ahead of time; donates the state, pins all shardings.

  Args:
    step: of `make`.
    like: the abstract state.
    mesh: of the batch; set as context by the caller.
    batch_size: global rows.
    sequence_length: T.
  """
  if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
    return step
  by_batch = sharding.batch_sharding(mesh)
  everywhere = sharding.replicated(mesh)
  batch = {
    k: jax.ShapeDtypeStruct(
      (batch_size, sequence_length), dtype, sharding=by_batch
    )
    for k, dtype in BATCH_DTYPES.items()
  }
  shardings = state_lib.shardings(like)
  jitted = jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(shardings, by_batch),
    out_shardings=(shardings, everywhere),
  )
  run = jitted.lower(like, batch).compile()
  _log_memory(run)
  return run


def _log_memory(run: jax.stages.Compiled) -> None:
  """One line: what the step needs on each device."""
  memory = run.memory_analysis()
  if memory is None:
    return
  sizes = {
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "donated": memory.alias_size_in_bytes,
  }
  logging.info(
    "memory of a step on each device: %s",
    ", ".join(f"{k} {v / 2**20:.1f} MiB" for k, v in sizes.items()),
  )
