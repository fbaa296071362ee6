"""A language model whose feed-forward levels learn while it reads.

Mechanism B of the continuum memory system (paper eq. 71; docs/mathematics.md
4.3): in the last layers each sequence has its own copy of the weights of the
fast levels, which learn from the loss of the tokens as they are read:

    theta_l <- theta_l - rate_l Red(sum over C_l tokens of grad CE_t)

C_1 tokens are a micro-chunk. It is closed, and the levels that are due are
updated, when the first token after it arrives: that token's logits are the
first to see the new weights. The slow weights, the start of the fast ones
among them, are learned through all updates by the outer loss.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from nl_jax import fields, types
from nl_jax import levels as runner
from nl_jax.fields import OneOf, Whole
from nl_jax.levels import LevelRow
from nl_jax.models import cms, layers, lm
from nl_jax.models import flops as counting
from nl_jax.models import leaves as leaf
from nl_jax.models.incontext import flops as own_flops
from nl_jax.models.incontext import (
  local_loss,
  micro_chunks,
  open_chunk,
)

TARGETS = ("inside", "next")
RULES = ("sgd", "momentum", "dgd")
OUTER = ("full", "first_order")
NESTED_META = ("none", "reptile", "fomaml", "full")
RESETS = ("sequence", "document")
INNER_LOSSES = ("task", *local_loss.LOSSES)
KERNELS = ("w_gate", "w_up", "w_down")  # Fast; norms stay slow.
_EPSILON = 1e-12  # Under the root of a squared norm: a finite derivative.


@dataclasses.dataclass(frozen=True)
class Options:
  """How levels learn in context; the part of `model.cms` that is about it.

  The paper states none of these values; clip and learnable rates are as in
  TTT-E2E.

  Attributes:
    chunks: C of each fast level in tokens, fastest first, each a multiple of
      the one before.
    fast_levels: names of the levels that learn, fastest first; (): all but the
      slowest, or the only one.
    fast_layers: how many of the last layers have fast levels; 0: a quarter.
    targets: what a micro-chunk learns: "inside", its own tokens; "next", also
      the first token after it.
    rule: "sgd"; "momentum" (heavy ball); "dgd": sgd with an erase, by
      1/2 sum_t w_t |sg(u_t) W|² in the inner loss of each kernel W of input u.
    rates: initial learning rates of the fast levels; they are learned.
    momentum: decay of the rule "momentum".
    clip: largest norm of a level's reduced gradient, over its layers.
    reduce: over a period's tokens: "mean", or "sum" (literal eq. 71).
    outer: "full" differentiates through the inner gradients; "first_order"
      takes them as constants.
    nested_meta: with the variant "nested", how the start of a level learns
      when the next slower one has updated: "none", "reptile", "fomaml", or
      "full", by the gradient through all updates since the last restart. That
      one keeps the text since then in the state, and reads it again.
    nested_rate: learning rate of that start.
    reset: fast weights are reset at each "sequence" (row) or "document".
    inner_loss: "task", the loss of the model's own logits; "local_dot" or
      "local_l2", one of each layer: see `local_loss`. There `clip` is of each
      token's error.
  """

  chunks: Annotated[tuple[int, ...], Whole(1)] = (64,)
  fast_levels: tuple[str, ...] = ()
  fast_layers: Annotated[int, Whole(0)] = 0
  targets: Annotated[str, OneOf(*TARGETS)] = "inside"
  rule: Annotated[str, OneOf(*RULES)] = "sgd"
  rates: Annotated[tuple[float, ...], fields.AT_LEAST_0] = (0.1,)
  momentum: Annotated[float, fields.DECAY] = 0.9
  clip: Annotated[float, fields.POSITIVE] = 1.0
  reduce: Annotated[str, OneOf("mean", "sum")] = "mean"
  outer: Annotated[str, OneOf(*OUTER)] = "full"
  nested_meta: Annotated[str, OneOf(*NESTED_META)] = "none"
  nested_rate: Annotated[float, fields.SHARE] = 0.1
  reset: Annotated[str, OneOf(*RESETS)] = "sequence"
  inner_loss: Annotated[str, OneOf(*INNER_LOSSES)] = "task"

  def __post_init__(self):
    fields.check("model.cms", Options, vars(self))
    if not self.chunks:
      raise ValueError("model.cms.chunks must have an entry, got ()")
    for fast, slow in zip(self.chunks, self.chunks[1:]):
      if slow % fast:
        raise ValueError(
          "model.cms.chunks go from fast to slow, each a multiple of the one "
          f"before, got {self.chunks}"
        )
    if self.targets == "inside" and self.chunks[0] < 2:
      raise ValueError(
        "model.cms.targets='inside' needs chunks of at least 2 tokens, got "
        f"{self.chunks}: use 'next'"
      )
    if len(self.rates) != len(self.chunks):
      raise ValueError(
        "model.cms.rates must have one entry for each of model.cms.chunks="
        f"{self.chunks}, got {self.rates}"
      )


@dataclasses.dataclass(frozen=True)
class InContextModel:
  """A `LanguageModel` with fast levels; the same functions.

  Attributes:
    base: the model whose levels learn in context.
    options: how they do.
    at_edge: whether `apply` may take it that a state and documents begin at
      edges of micro-chunks, as rows of training do; it spares pieces.
  """

  base: lm.LanguageModel
  options: Options
  at_edge: bool = False

  def __post_init__(self):
    if self.base.whole:
      raise ValueError(
        f"model.arch={self.base.arch!r} has a feed-forward part of its own "
        "form, which does not learn in context: use model.arch='hope'"
      )
    if self.fast_layers > self.base.units:
      raise ValueError(
        f"model.cms.fast_layers must be at most {self.base.units}, got "
        f"{self.fast_layers}"
      )
    known, fast = self.base.cms.levels, self.fast_levels
    if [x for x in known if x in fast] != list(fast):
      raise ValueError(
        "model.cms.fast_levels must be names of model.cms.levels="
        f"{known}, fastest first, got {fast}"
      )
    if len(fast) != len(self.options.chunks):
      raise ValueError(
        f"model.cms.chunks must have one entry for each of the fast levels "
        f"{', '.join(fast)}, got {self.options.chunks}"
      )
    if self.local:
      local_loss.check(self)

  def __getattr__(self, name: str) -> Any:
    """Shapes and settings are those of `base`."""
    if name in ("base", "options", "at_edge") or name.startswith("__"):
      raise AttributeError(name)
    return getattr(self.base, name)

  @property
  def inner(self) -> lm.LanguageModel:
    """The base model inside the levels' loops: walks by XLA.

    These run under `vmap` and are differentiated twice; a kernel has one
    derivative.
    """
    options = self.base.mixer
    walks = options is not None and "walk" in vars(options)
    if not walks or options.walk == "xla":
      return self.base
    return dataclasses.replace(
      self.base, mixer=dataclasses.replace(options, walk="xla")
    )

  @property
  def cms(self) -> cms.Options:
    """The levels as the optimizer sees them: restarts are in context."""
    config = self.base.cms
    variant = "sequential" if config.variant == "nested" else config.variant
    return dataclasses.replace(config, variant=variant)

  @property
  def local(self) -> bool:
    """Whether levels learn from losses of their own layers."""
    return self.options.inner_loss != "task"

  @property
  def fast_levels(self) -> tuple[str, ...]:
    """Names of the levels that learn in context, fastest first."""
    names = self.base.cms.levels
    return self.options.fast_levels or names[: max(len(names) - 1, 1)]

  @property
  def fast_layers(self) -> int:
    """How many of the last layers have fast levels."""
    return self.options.fast_layers or max(self.base.units // 4, 1)

  @property
  def alignment(self) -> int:
    """Documents of a packed row must begin at multiples of this."""
    if self.options.reset == "sequence":
      return self.base.alignment
    step, longest = self.base.alignment, self.options.chunks[-1]
    if self.local:
      return math.lcm(step, longest)
    if longest % step:
      raise ValueError(
        "model.cms.reset='document' needs the slowest of model.cms.chunks to "
        f"be a multiple of {step}, the chunk of the memories, got {longest}"
      )
    return longest

  def leaves(self) -> leaf.Leaves:
    """The table of `base`, and in_context {log_rate (fast levels,)}.

    With a local loss also in_context/w_target: see `local_loss.leaves`.
    """
    rates = self.options.rates
    start = lambda *_: jnp.log(jnp.asarray(rates, jnp.float32))
    own = {"log_rate": leaf.Leaf((len(rates),), ("level",), start)}
    if self.local:
      own |= leaf.under("w_target", local_loss.leaves(self), 0)
    return {**self.base.leaves(), **leaf.under("in_context", own)}

  def axes(self) -> dict[str, tuple[str, ...]]:
    """The logical axes of the parameters by path."""
    return leaf.axes(self.leaves())

  def init(self, key: types.Array) -> types.Params:
    """The parameters of `base`, and in_context; see `leaves`."""
    return leaf.drawn(self.leaves(), key)

  def init_state(
    self, params: types.Params, batch_size: int, length: int | None = None
  ) -> micro_chunks.InContextState | lm.LMState:
    """The state at the start of a sequence; arguments as of `base`."""
    if self.local:
      return local_loss.init_state(self, params, batch_size, length)
    start = self.base.init_state(params, batch_size, length)
    slow, fast = self.split_mixers(start.layers)
    again = jax.vmap(
      lambda mixers: micro_chunks.begin_levels(self, params, mixers), in_axes=1
    )
    dtype = layers.activation_dtype(self.base.dtype, params)
    C = self.options.chunks[0]
    wide = layers.at_least_float32(dtype)
    zero = jnp.zeros((batch_size, C), jnp.int32)
    return micro_chunks.InContextState(
      {"slow": slow, "begin": fast, "now": fast},
      again(fast),
      open_chunk.Buffer(
        jnp.zeros((batch_size, C, self.base.width), dtype),
        zero,
        zero,
        jnp.zeros((batch_size, C), wide),
        start.position_B,
      ),
      start.position_B,
    )

  def apply(
    self,
    params: types.Params,
    tokens_BxT: types.Array,
    state: Any = None,
    *,
    segment_ids: types.Array | None = None,
    learn: types.Array | None = None,
  ) -> tuple[types.Array, Any, dict[str, Any]]:
    """Logits of the next token, for training, prefill and decoding alike.

    From the start of a sequence rows are padded on the right: padding before
    a row's first token counts as tokens of its first micro-chunk.

    Args:
      params: of `init`.
      tokens_BxT: int32 ids.
      state: `InContextState`, with a local loss `LMState`, of the call before;
        None is the start of a sequence.
      segment_ids: int32 [B,T], 0 is padding; as of `base`.
      learn: [B,T], weight of the loss of the logits at t against token t+1 in
        the inner loss; default 1. A token of another document is not a target.

    Returns:
      logits [B,T,Vocab] in float32 at least, the state after the call, and
      metrics of the memories: sums over real tokens, leaves [L,B,H].
    """
    tokens_BxT = jnp.asarray(tokens_BxT, jnp.int32)
    if segment_ids is not None:
      segment_ids = jnp.asarray(segment_ids, jnp.int32)
    dtype = layers.activation_dtype(self.base.dtype, params)
    x_BxTxD = params["embed"].astype(dtype)[tokens_BxT]
    wide = layers.at_least_float32(dtype)
    if learn is None:
      learn = jnp.ones(tokens_BxT.shape, wide)
    carried = None if state is None else state.layers["slow"]
    if self.local:
      x_BxTxD, slow, metrics = self.base.stack(
        self.split(params["blocks"])[0], x_BxTxD, carried, segment_ids
      )
      x_BxTxD, held, fast_metrics = local_loss.apply(
        self, params, x_BxTxD, state, segment_ids, learn.astype(wide)
      )
      logits = self.base.logits(params, x_BxTxD)
      seen = lm.count_real(tokens_BxT, segment_ids)
      before = jnp.zeros_like(seen) if state is None else state.position_B
      local = lm.LMState({"slow": slow, **held}, lm.counted(before, seen))
      return logits, local, _joined(metrics, fast_metrics)
    x_BxTxD, slow, metrics = self._before_levels(
      params, x_BxTxD, carried, segment_ids
    )
    run: Any = micro_chunks.whole if state is None else micro_chunks.go_on
    logits, after, fast_metrics = run(
      self, params, x_BxTxD, tokens_BxT, segment_ids, learn.astype(wide), state
    )
    after.layers["slow"] = slow
    return logits, after, _joined(metrics, fast_metrics)

  def _before_levels(
    self,
    params: types.Params,
    x_BxTxD: types.Array,
    carried: Any,
    segment_ids: types.Array | None,
  ) -> tuple[types.Array, Any, dict[str, Any]]:
    """All that no fast weight is before: the whole call runs at once.

    These are the layers without fast levels and the next one's mixer. Arguments
    and results are as of `lm.LanguageModel.stack`.
    """
    blocks, fast = self.split(params["blocks"])
    at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    x_BxTxD, held, metrics = self.base.stack(
      blocks, x_BxTxD, at(carried, slice(-1)), segment_ids
    )
    mix = self.base.mix
    if self.base.remat == "layer":
      mix = jax.checkpoint(mix)
    x_BxTxD, *more = mix(at(fast, 0), x_BxTxD, at(carried, -1), segment_ids)
    join = lambda a, b: jnp.concatenate([a, b[None]])
    held, metrics = jax.tree.map(join, (held, metrics), tuple(more))
    return x_BxTxD, held, metrics

  def parameter_count(self) -> int:
    """Parameters of the whole model."""
    return leaf.count(self.leaves())

  def flops(self, tokens: int) -> counting.Flops:
    """FLOPs of a token in the forward pass, in a sequence of `tokens`."""
    own = own_flops.local(self) if self.local else own_flops.task(self, tokens)
    return self.base.flops(tokens)._replace(in_context=own)

  def levels(
    self,
  ) -> tuple[list[LevelRow], Callable[[types.Params], types.Params]]:
    """Rows of the card and labels, as of `base`; fast levels have rows."""
    (rows, label), fast = self.base.levels(), self._rows()
    moved = {row.name: row.parameters for row in fast}
    left = []
    for row in rows:
      parameters = row.parameters - moved.get(row.name, 0)
      if row.kind == "slow weights":
        # Rates and projections to what a level learns.
        parameters += self.parameter_count() - self.base.parameter_count()
        if len(self.base.cms.levels) == 1:  # Without a row of its own.
          parameters -= sum(moved.values())
      left.append(dataclasses.replace(row, parameters=parameters))
    first, last = self.base.units - self.fast_layers + 1, self.base.units
    span = f"layers {first} to {last}" if first < last else f"layer {last}"
    named = lambda row: dataclasses.replace(row, name=f"{row.name}, {span}")
    fast = list(map(named, fast))
    mixers = [row for row in left if row.kind in ("memory", "attention")]
    others = [row for row in left if row not in mixers and row.parameters]
    return mixers + fast + others, label

  def _rows(self) -> list[LevelRow]:
    """A row for each fast level, named as that of its slow layers."""
    params = jax.eval_shape(self.init, jax.random.key(0))
    state = jax.eval_shape(lambda p: self.init_state(p, 1), params)
    held = state.layers["fast"] if self.local else state.levels
    size = lambda tree: sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
    config, options = self.base.cms, self.options
    widths = dict(zip(config.levels, config.widths))
    full = options.outer == "full"
    return [
      LevelRow(
        name=f"{name} FFN",
        kind="feed-forward",
        chunk=chunk,
        bptt=max((self.base.sequence_length - 1) // chunk, 1) if full else 1,
        objective=(
          "task loss" if options.inner_loss == "task" else options.inner_loss
        ),
        rule=options.rule,
        transfer="init",
        state_bytes=size(held[name]),
        parameters=3 * self.base.width * widths[name] * self.fast_layers,
      )
      for name, chunk in zip(self.fast_levels, options.chunks)
    ]

  def split(self, stacked: Any) -> tuple[Any, Any]:
    """The layers without fast levels, and those with."""
    return _cut(stacked, self.base.units - self.fast_layers)

  def split_mixers(self, states: Any) -> tuple[Any, Any]:
    """The mixers that no fast weight is before, and the others."""
    return _cut(states, self.base.units - self.fast_layers + 1)

  def theta(self, params: types.Params) -> dict[str, types.Params]:
    """The start of the fast weights by level, leaves [fast layers,...]."""
    blocks = self.split(params["blocks"])[1]["cms"]
    wide = lambda w: w.astype(layers.at_least_float32(w.dtype))
    return {
      name: {kernel: wide(blocks[name][kernel]) for kernel in KERNELS}
      for name in self.fast_levels
    }

  def rules(self, params: types.Params) -> list[runner.Level]:
    """The fast levels, fastest first; a unit is a micro-chunk."""
    options, made = self.options, []
    nested = self.base.cms.variant == "nested"
    restarts: dict[str, Any] = {
      "none": lambda start, theta, gradient: (start, start),
      "reptile": functools.partial(_reptile, options.nested_rate),
      "fomaml": functools.partial(_maml, options.nested_rate),
      "full": functools.partial(_maml, options.nested_rate),
    }
    last = len(options.chunks) - 1
    for i, (name, chunk) in enumerate(zip(self.fast_levels, options.chunks)):
      rate = jnp.exp(params["in_context"]["log_rate"][i])
      made.append(
        runner.Level(
          name,
          chunk // options.chunks[0],
          _rule(options, rate),
          options.reduce,
          restarts[options.nested_meta] if nested and i < last else None,
          full=options.nested_meta == "full" and nested and i < last,
        )
      )
    return made


def _cut(stacked: Any, at: int) -> tuple[Any, Any]:
  before = jax.tree.map(lambda x: x[:at], stacked)
  return before, jax.tree.map(lambda x: x[at:], stacked)


def _joined(slow: dict[str, Any], fast: dict[str, Any]) -> dict[str, Any]:
  """Metrics of all layers; those of levels are of the fast layers only."""
  join = lambda a, b: jnp.concatenate([a, b])
  both = {k: jax.tree.map(join, slow[k], fast[k]) for k in slow if k in fast}
  return {**slow, **fast, **both}


def _reptile(
  rate: float, start: Any, theta: Any, gradient: Any
) -> tuple[Any, Any]:
  """Reptile: the start moves towards where its learning ended."""
  del gradient
  start = jax.tree.map(lambda a, b: a + rate * (b - a), start, theta)
  return start, start


def _maml(
  rate: float, start: Any, theta: Any, gradient: Any
) -> tuple[Any, Any]:
  """MAML: the start moves by the gradient of the loss of its last period."""
  del theta
  start = jax.tree.map(lambda a, g: a - rate * g, start, gradient)
  return start, start


def _rule(options: Options, rate: types.Array) -> optax.GradientTransformation:
  """-rate · clip(g), or of its momentum; a learned rate.

  g min(1, clip / sqrt(|g|² + epsilon)) has a finite derivative at g = 0, where
  that of `optax.clip_by_global_norm` is NaN.
  """

  def clip(gradient: Any) -> Any:
    square = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient))
    scale = jnp.minimum(1.0, options.clip * jax.lax.rsqrt(square + _EPSILON))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient)

  step = lambda g: jax.tree.map(lambda g: -rate.astype(g.dtype) * g, g)
  stages = [optax.stateless(lambda g, _: clip(g))]
  if options.rule == "momentum":
    stages.append(optax.trace(options.momentum))
  stages.append(optax.stateless(lambda g, _: step(g)))
  return optax.chain(*stages)
