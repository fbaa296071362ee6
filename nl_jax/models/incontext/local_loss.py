"""Levels that learn in context from a loss of their own layer.

The cheap form of `incontext` (docs/mathematics.md 4.3; not the
paper's rule): a fast level learns, with x̄ = RMSNorm(x) and a learned slow
projection W_t (D,D),

    local_dot:  -⟨MLP(x̄), x̄ W_t⟩        local_l2:  ½ |MLP(x̄) - x̄ W_t|²

No output head and no other layer stand in its loop: a level is a memory of one
head, read at the weights of the last chunk edge, and the whole text runs
through each layer at once.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nl_jax import memory, types
from nl_jax.models import cms, layers, lm
from nl_jax.models import leaves as leaf
from nl_jax.models.incontext import contract

LOSSES = {"local_dot": "dot", "local_l2": "l2"}


def check(model: contract.Learner) -> None:
  """Raises ValueError for options that belong to the task loss."""
  options = model.options
  for field, wanted in (("rule", ("sgd", "dgd")), ("reset", ("document",))):
    if getattr(options, field) not in wanted:
      raise ValueError(
        f"model.cms.inner_loss={options.inner_loss!r} needs model.cms.{field}="
        f"{' or '.join(wanted)}, got {getattr(options, field)!r}"
      )
  if model.base.cms.variant == "nested":
    raise ValueError(
      f"model.cms.inner_loss={options.inner_loss!r} has no variant 'nested': "
      "use 'sequential' or 'independent'"
    )


def leaves(model: contract.Learner) -> dict[str, leaf.Leaf]:
  """{level: W_t of its layers (fast layers,D,D)}."""
  D = model.base.width
  shape, axes = (model.fast_layers, D, D), ("layer", "embed", "act_embed")
  return {
    name: leaf.kernel(shape, axes, i, D**-0.5)
    for i, name in enumerate(model.fast_levels)
  }


def rule(model: contract.Learner, chunk: int) -> memory.Rule:
  """How a level with chunks of C tokens learns, as a memory."""
  options = model.options
  return memory.Rule(
    chunk=chunk,
    objective=LOSSES[options.inner_loss],
    dgd_scope="per_layer" if options.rule == "dgd" else "none",
    dgd_coef="prox",  # Inputs are not of unit norm: the raw erase diverges.
    retention_target="zero",  # Without effect: nothing decays.
    erase_of="whole",
    read="chunk_start",
    residual_clip=options.clip,
    remat_group=1,
    stop_grad_writes=options.outer == "first_order",
  )


def init_state(
  model: contract.Learner,
  params: types.Params,
  batch_size: int,
  length: int | None,
) -> lm.LMState:
  """`layers`: {"slow", "now"} of the mixers, {"fast"} of the fast levels."""
  start = model.base.init_state(params, batch_size, length)
  slow, fast = model.split(start.layers)
  levels = {}
  chunks = zip(model.theta(params).items(), model.options.chunks)
  for (name, weights), chunk in chunks:
    begin = functools.partial(
      _start, batch_size=batch_size, how=rule(model, chunk)
    )
    levels[name] = jax.vmap(begin)(weights)
  return lm.LMState(
    {"slow": slow, "now": fast, "fast": levels}, start.position_B
  )


def _start(
  weights: types.Params, batch_size: int, how: memory.Rule
) -> memory.chunked.MemoryState:
  one_head = jax.tree.map(lambda w: w[None], weights)
  return memory.chunked.start(one_head, batch_size, how)


def apply(
  model: contract.Learner,
  params: types.Params,
  x_BxTxD: types.Array,
  state: lm.LMState | None,
  segment_ids: types.Array | None,
  learn_BxT: types.Array,
) -> tuple[types.Array, dict[str, Any], dict[str, Any]]:
  """The fast layers; arguments as of `incontext.InContextModel.apply`.

  Args:
    model, params, state, segment_ids: as there.
    x_BxTxD: residual stream before the fast layers.
    learn_BxT: weights of the tokens' inner losses.

  Returns:
    The residual stream, {"now", "fast"} states and metrics: those of the
    mixers and of "cms/<level>", leaves [fast layers,B,·].
  """
  blocks = model.split(params["blocks"])[1]
  starts, fresh = model.theta(params), state is None
  if state is None:
    batch, tokens = x_BxTxD.shape[:2]
    levels = init_state(model, params, batch, tokens).layers["fast"]
    mixers = None
  else:
    levels, mixers = state.layers["fast"], state.layers["now"]

  def layer(x: types.Array, scanned: Any) -> tuple[types.Array, Any]:
    block, start, targets, mixer, held = scanned
    x, mixer, metrics = model.base.mix(block, x, mixer, segment_ids)

    def level(i: int, name: str, x: types.Array) -> types.Array:
      learn = jax.named_scope(name)(_learn)
      y, held[name], metrics[f"cms/{name}"] = learn(
        model, i, start[name], targets[name], held[name], x, segment_ids,
        learn_BxT, jnp.exp(params["in_context"]["log_rate"][i]), fresh,
      )  # fmt: skip
      return y

    held = dict(held)
    x = _feed_forward(model, block["cms"], x, level)
    return x, (mixer, held, metrics)

  if model.base.remat == "layer":
    layer = jax.checkpoint(layer, prevent_cse=False)
  targets = params["in_context"]["w_target"]
  x_BxTxD, (mixers, levels, metrics) = jax.lax.scan(
    layer, x_BxTxD, (blocks, starts, targets, mixers, levels)
  )
  return x_BxTxD, {"now": mixers, "fast": levels}, metrics


def _feed_forward(
  model: contract.Learner,
  block: types.Params,
  x: types.Array,
  fast: Any,
) -> types.Array:
  """The CMS of one layer; `fast(i, name, x̄)` is the i-th fast level."""
  config, order = model.base.cms, list(model.fast_levels)
  outputs = []
  for name in config.levels:
    own, z = block[name], x
    if config.norm:
      z = layers.rms_norm(x, own["norm"]["scale"], model.base.norm_epsilon)
    if name in order:
      y = fast(order.index(name), name, z)
    else:
      hidden = layers.gated(z, own["w_gate"], own["w_up"])
      y = layers.dense(hidden, own["w_down"])
    if config.variant == "independent":
      outputs.append(y)
    else:
      x = x + y if config.residual else y
  if config.variant != "independent":
    return x
  if config.mixes:
    mix = block[cms.MIX].astype(x.dtype)
    outputs = [mix[i] * y for i, y in enumerate(outputs)]
  total = sum(outputs[1:], outputs[0])
  return x + total if config.residual else total


def _swiglu(layer: memory.rule.Layer, z: types.Array) -> types.Array:
  return layer("w_down", jax.nn.silu(layer("w_gate", z)) * layer("w_up", z))


def _learn(
  model: contract.Learner,
  number: int,
  start: Mapping[str, types.Array],
  target_DxD: types.Array,
  state: memory.chunked.MemoryState,
  x_BxTxD: types.Array,
  segment_ids: types.Array | None,
  learn_BxT: types.Array,
  rate: types.Array,
  fresh: bool,
) -> tuple[types.Array, memory.chunked.MemoryState, memory.rule.Metrics]:
  """One fast level of one layer: reads, and learns, all tokens."""
  options = model.options
  chunk = options.chunks[number]
  eta = rate / chunk if options.reduce == "mean" else rate
  eta_BxTx1 = (eta * learn_BxT)[..., None]
  one_head = lambda x: x[:, :, None]
  y, state, metrics = memory.chunked.update(
    _swiglu,
    {name: w[None] for name, w in start.items()},
    state,
    one_head(x_BxTxD),
    one_head(x_BxTxD),
    one_head(layers.dense(x_BxTxD, target_DxD)),
    memory.Gates(eta_BxTx1, jnp.zeros_like(eta_BxTx1)),
    rule=rule(model, chunk),
    segment_ids=segment_ids,
    at_edge=fresh,
    aligned=fresh,
    run=memory.Run("xla"),
    name="local_loss",
  )
  return y[:, :, 0].astype(x_BxTxD.dtype), state, metrics
