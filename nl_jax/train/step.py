"""One step: the loss, its gradient over micro-batches, one guarded update.

    loss = sum_bt w_bt (logsumexp(logits_bt) - logits_bt[target_bt]) / sum w

Everything the loop wants to know is reduced here, on the device.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from nl_jax import sharding
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
  logits, _, metrics = model.apply(
    params, batch["inputs"], segment_ids=batch["segment_ids"]
  )
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  losses = cross_entropy(logits, batch["targets"])
  weights = batch["weights"].astype(losses.dtype)
  sums = jax.tree.map(jnp.sum, metrics)
  return jnp.sum(weights * losses), (jnp.sum(weights), sums)


def gradient(
  params: Any, model: Any, batch: Batch, accumulate: int
) -> tuple[jax.Array, Any, jax.Array, Any]:
  """Loss and gradient of a batch, taken in micro-batches.

  Sums of all micro-batches are divided by the weight of all, so that the
  result is the gradient of the batch however its weights are spread.

  Args:
    params: of the model.
    model: see `loss_sum`.
    batch: arrays [B,T].
    accumulate: number of micro-batches, a divisor of B.

  Returns:
    loss, gradient, sum of weights, memory sums.
  """
  value_and_grad = jax.value_and_grad(loss_sum, has_aux=True)
  one = lambda part: value_and_grad(params, model, part)
  if accumulate == 1:
    (total, (weight, sums)), grads = one(batch)
  else:
    parts = {k: _micro(x, accumulate) for k, x in batch.items()}
    zero = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(one, {k: x[0] for k, x in parts.items()}),
    )
    add = lambda carry, part: (jax.tree.map(jnp.add, carry, one(part)), None)
    ((total, (weight, sums)), grads), _ = jax.lax.scan(add, zero, parts)
  scale = 1 / jnp.maximum(weight, 1)
  grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
  return total * scale, grads, weight, sums


def _micro(x_BxT: jax.Array, accumulate: int) -> jax.Array:
  """[B,T] to [accumulate, B / accumulate, T]; each device keeps its rows."""
  batch, length = x_BxT.shape
  x = x_BxT.reshape(batch // accumulate, accumulate, length).swapaxes(0, 1)
  return sharding.constrain(x, None, "batch", "length")


def make(
  model: Any,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  labels: Callable[[Any], Any],
  *,
  accumulate: int = 1,
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
    max_skipped: steps that may be skipped, over the whole run.
  """

  def step(
    state: state_lib.State, batch: Batch
  ) -> tuple[state_lib.State, Metrics]:
    params = state["params"]
    loss, grads, weight, sums = gradient(params, model, batch, accumulate)
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
  if jax.config.jax_disable_jit:
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
