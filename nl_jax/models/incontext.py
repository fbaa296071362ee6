"""A language model whose feed-forward levels learn while it reads.

Mechanism B of the continuum memory system (paper eq. 71; model.md §4.3): in
the last layers each sequence has its own copy of the weights of the fast
levels, which learn from the loss of the tokens as they are read:

    theta_l <- theta_l - rate_l Red(sum over C_l tokens of grad CE_t)

C_1 tokens are a micro-chunk. It is closed, and the levels that are due are
updated, when the first token after it arrives: that token's logits are the
first to see the new weights. The slow weights, the start of the fast ones
among them, are learned through all updates by the outer loss.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nl_jax import card, types
from nl_jax import levels as runner
from nl_jax.models import cms, layers, lm, local_loss

TARGETS = ("inside", "next")
RULES = ("sgd", "momentum", "dgd")
OUTER = ("full", "first_order")
NESTED_META = ("none", "reptile", "fomaml", "full")
RESETS = ("sequence", "document")
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
    targets: of a micro-chunk, "inside": tokens inside it; "next": also the
      first one after it.
    rule: "sgd"; "momentum" (heavy ball); "dgd": sgd with an erase, by
      1/2 sum_t w_t |sg(u_t) W|² in the inner loss of each kernel W of input u.
    rates: learning rates of the fast levels at the start; they are learned.
    momentum: of the rule of that name.
    clip: largest norm of a level's reduced gradient, over its layers.
    reduce: over a period's tokens: "mean", or "sum" (literal eq. 71).
    outer: "full" differentiates through the inner gradients; "first_order"
      takes them as constants.
    nested_meta: with the variant "nested", how the start of a level learns
      when the next slower one has updated: "none", "reptile", "fomaml", or
      "full", by the gradient through all updates since the last restart. That
      one keeps the text since then in the state, and reads it again.
    nested_rate: of that.
    reset: fast weights begin anew with each "sequence" (row) or "document".
    inner_loss: "task", the loss of the model's own logits; "local_dot" or
      "local_l2", one of each layer: see `local_loss`. There `clip` is of each
      token's error.
  """

  chunks: tuple[int, ...] = (64,)
  fast_levels: tuple[str, ...] = ()
  fast_layers: int = 0
  targets: str = "inside"
  rule: str = "sgd"
  rates: tuple[float, ...] = (0.1,)
  momentum: float = 0.9
  clip: float = 1.0
  reduce: str = "mean"
  outer: str = "full"
  nested_meta: str = "none"
  nested_rate: float = 0.1
  reset: str = "sequence"
  inner_loss: str = "task"

  def __post_init__(self):
    for field, known in (
      ("targets", TARGETS),
      ("rule", RULES),
      ("outer", OUTER),
      ("nested_meta", NESTED_META),
      ("reset", RESETS),
      ("inner_loss", ("task", *local_loss.LOSSES)),
    ):
      if getattr(self, field) not in known:
        raise ValueError(
          f"model.cms.{field} must be one of {', '.join(known)}; got "
          f"{getattr(self, field)!r}"
        )
    if not self.chunks or any(type(c) is not int or c < 1 for c in self.chunks):
      raise ValueError(
        f"model.cms.chunks must be integers >= 1, got {self.chunks}"
      )
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
    if len(self.rates) != len(self.chunks) or any(r < 0 for r in self.rates):
      raise ValueError(
        "model.cms.rates must be one number >= 0 for each of model.cms.chunks="
        f"{self.chunks}, got {self.rates}"
      )
    if not 0 <= self.momentum < 1 or not self.clip > 0:
      raise ValueError(
        "model.cms.momentum must be in [0, 1) and clip above 0, got "
        f"{self.momentum} and {self.clip}"
      )
    if not 0 <= self.nested_rate <= 1:
      raise ValueError(
        f"model.cms.nested_rate must be in [0, 1], got {self.nested_rate}"
      )


class Buffer(NamedTuple):
  """The open micro-chunk; zeros behind its tokens.

  Attributes:
    x_BxCxD: what its tokens were before the fast layers.
    tokens_BxC: int32 ids.
    ids_BxC: int32, their documents; 0: padding, or none yet.
    learn_BxC: weights of their losses in the inner loss.
    phase_B: int32, tokens in it.
  """

  x_BxCxD: types.Array
  tokens_BxC: types.Array
  ids_BxC: types.Array
  learn_BxC: types.Array
  phase_B: types.Array


class InContextState(NamedTuple):
  """What a model carries from call to call, apart from its slow weights.

  Attributes:
    layers: states of the mixers, leaves [L,B,...]: "slow", of the layers
      without fast levels; "begin" and "now", of the others at the start of the
      open micro-chunk and after the last token.
    levels: `LevelState` of each fast level, leaves [B,...].
    buffer: the open micro-chunk.
    position_B: int32, real tokens seen.
  """

  layers: dict[str, Any]
  levels: runner.State
  buffer: Buffer
  position_B: types.Array


class _Unit(NamedTuple):
  """A micro-chunk of one sequence, as the inner loss takes it.

  Attributes:
    x_CxD: residual stream before the fast layers.
    ids_C: int32 documents, or None: no padding, one document.
    targets_C: int32, the token after each.
    weights_C: of their losses.
    there: bool, whether it is closed in this call.
  """

  x_CxD: types.Array
  ids_C: types.Array | None
  targets_C: types.Array
  weights_C: types.Array
  there: types.Array


@dataclasses.dataclass(frozen=True)
class InContextModel:
  """A `LanguageModel` with fast levels; the same functions.

  Attributes:
    base: the model whose levels learn in context.
    options: how they do.
  """

  base: lm.LanguageModel
  options: Options

  def __post_init__(self):
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
    if name in ("base", "options") or name.startswith("__"):
      raise AttributeError(name)
    return getattr(self.base, name)

  @property
  def cms(self) -> cms.CMSConfig:
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

  def init(self, key: types.Array) -> types.Params:
    """The parameters of `base`, and in_context {log_rate (fast levels,)}.

    With a local loss also in_context/w_target: see `local_loss.init`.
    """
    rates = jnp.asarray(self.options.rates, jnp.float32)
    own = {"log_rate": jnp.log(rates)}
    if self.local:
      # A key that the base does not draw from.
      own["w_target"] = local_loss.init(jax.random.fold_in(key, 0), self)
    return {**self.base.init(key), "in_context": own}

  def init_state(
    self, params: types.Params, batch_size: int, length: int | None = None
  ) -> InContextState | lm.LMState:
    """The state at the start of a sequence; arguments as of `base`."""
    if self.local:
      return local_loss.init_state(self, params, batch_size, length)
    start = self.base.init_state(params, batch_size, length)
    slow, fast = self.split(start.layers)
    again = jax.vmap(lambda mixers: self._start(params, mixers), in_axes=1)
    dtype = layers.activation_dtype(self.base.dtype, params)
    C = self.options.chunks[0]
    wide = layers.at_least_float32(dtype)
    zero = jnp.zeros((batch_size, C), jnp.int32)
    return InContextState(
      {"slow": slow, "begin": fast, "now": fast},
      again(fast),
      Buffer(
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
    state: InContextState | None = None,
    *,
    segment_ids: types.Array | None = None,
    learn: types.Array | None = None,
  ) -> tuple[types.Array, InContextState, dict[str, Any]]:
    """Logits of the next token, for training, prefill and decoding alike.

    From the start of a sequence rows are padded on the right: padding before
    a row's first token counts as tokens of its first micro-chunk.

    Args:
      params: of `init`.
      tokens_BxT: int32 ids.
      state: of the call before; None is the start of a sequence.
      segment_ids: int32 [B,T], 0 is padding; as of `base`.
      learn: [B,T], weight of the loss of the logits at t against token t+1 in
        the inner loss; default 1. A token of another document is no target.

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
    slow_blocks, _ = self.split(params["blocks"])
    x_BxTxD, slow, metrics = self.base.stack(
      slow_blocks,
      x_BxTxD,
      None if state is None else state.layers["slow"],
      segment_ids,
    )
    if self.local:
      x_BxTxD, held, fast_metrics = local_loss.apply(
        self, params, x_BxTxD, state, segment_ids, learn.astype(wide)
      )
      logits = self.base.logits(params, x_BxTxD)
      seen = jnp.sum(_ids(tokens_BxT, segment_ids) > 0, 1, dtype=jnp.int32)
      before = 0 if state is None else state.position_B
      after = lm.LMState({"slow": slow, **held}, before + seen)
      return logits, after, _joined(metrics, fast_metrics)
    run = self._whole if state is None else self._go_on
    logits, after, fast_metrics = run(
      params, x_BxTxD, tokens_BxT, segment_ids, learn.astype(wide), state
    )
    after.layers["slow"] = slow
    return logits, after, _joined(metrics, fast_metrics)

  def parameter_count(self) -> int:
    """That of `base`, a rate and, with a local loss, D² a layer and level."""
    own = 1 + self.local * self.fast_layers * self.base.width**2
    return self.base.parameter_count() + own * len(self.fast_levels)

  def levels(
    self,
  ) -> tuple[list[card.Row], Callable[[types.Params], types.Params]]:
    """Rows of the card and labels, as of `base`; fast levels have rows."""
    rows, label = self.base.levels()
    fast = self._rows()
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
    fast = [
      dataclasses.replace(row, name=f"{row.name}, {span}") for row in fast
    ]
    mixers = [row for row in left if row.kind in ("memory", "attention")]
    others = [row for row in left if row not in mixers and row.parameters]
    return mixers + fast + others, label

  def _rows(self) -> list[card.Row]:
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
      card.Row(
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
    cut = self.base.units - self.fast_layers
    return (
      jax.tree.map(lambda x: x[:cut], stacked),
      jax.tree.map(lambda x: x[cut:], stacked),
    )

  def theta(self, params: types.Params) -> dict[str, types.Params]:
    """The start of the fast weights by level, leaves [fast layers,...]."""
    blocks = self.split(params["blocks"])[1]["cms"]
    wide = lambda w: w.astype(layers.at_least_float32(w.dtype))
    return {
      name: {kernel: wide(blocks[name][kernel]) for kernel in KERNELS}
      for name in self.fast_levels
    }

  def _levels(self, params: types.Params) -> list[runner.Level]:
    options, made = self.options, []
    nested = self.base.cms.variant == "nested"
    restarts = {
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

  def _start(self, params: types.Params, mixers: Any) -> runner.State:
    """The levels of one sequence before its first token.

    Args:
      params: of `init`.
      mixers: states of the fast layers, or arrays like them.
    """
    base, C = self.base, self.options.chunks[0]
    dtype = layers.activation_dtype(base.dtype, params)
    unit = _Unit(
      jnp.zeros((C, base.width), dtype),
      jnp.zeros((C,), jnp.int32),
      jnp.zeros((C,), jnp.int32),
      jnp.zeros((C,), layers.at_least_float32(dtype)),
      jnp.zeros((), bool),
    )
    return runner.nested_init(
      self._levels(params), self.theta(params), (mixers, mixers), unit
    )

  def _fast(
    self,
    params: types.Params,
    theta: Mapping[str, types.Params],
    state: Any,
    x_CxD: types.Array,
    ids_C: types.Array | None,
  ) -> tuple[types.Array, Any, dict[str, Any], dict[str, Any]]:
    """The fast layers of one sequence.

    Returns:
      The residual stream [C,D], the mixers' states, metrics, and by level
      what its kernels read.
    """
    one = lambda tree: jax.tree.map(lambda x: x[:, None], tree)
    blocks = self.split(params["blocks"])[1]
    feed_forward = dict(blocks["cms"])
    for name, kernels in theta.items():
      feed_forward[name] = {**feed_forward[name], **kernels}
    blocks = {**blocks, "cms": feed_forward}
    ids = None if ids_C is None else ids_C[None]

    def layer(x: types.Array, scanned: Any) -> tuple[types.Array, Any]:
      block, mixer_state = scanned
      x, mixer_state, metrics = self.base.mix(block, x, mixer_state, ids)
      x, read = cms.apply_and_tell(
        block["cms"], x, self.base.cms, self.base.norm_epsilon
      )
      if self.options.rule != "dgd":
        read = {}
      return x, (mixer_state, metrics, read)

    x, (state, metrics, read) = jax.lax.scan(
      layer, x_CxD[None], (blocks, one(state))
    )
    alone = lambda tree: jax.tree.map(lambda x: x[:, 0], tree)
    return x[0], alone(state), alone(metrics), alone(read)

  def _loss(self, params: types.Params, with_logits: bool) -> runner.LossFn:
    """The inner loss of a micro-chunk; its carry is (begin, now)."""

    def loss_fn(
      theta: dict[str, types.Params], carry: Any, unit: _Unit
    ) -> tuple[types.Array, Any]:
      begin, now = carry
      x, new, metrics, read = self._fast(
        params, theta, now, unit.x_CxD, unit.ids_C
      )
      logits = self.base.logits(params, x[None])[0]
      chosen = jnp.take_along_axis(logits, unit.targets_C[:, None], -1)[:, 0]
      nats = jax.nn.logsumexp(logits, -1) - chosen
      loss = jnp.sum(unit.weights_C * nats)
      if self.options.rule == "dgd":
        loss += _erase(theta, read, unit.weights_C)
      weight = jnp.where(unit.there, jnp.sum(unit.weights_C), -1)
      keep = lambda x, y: jnp.where(unit.there, x, y)
      begin = jax.tree.map(keep, new, begin)
      output = (logits, metrics) if with_logits else ()
      return loss, ((begin, new), weight, output)

    return loss_fn

  def _whole(
    self,
    params: types.Params,
    x_BxTxD: types.Array,
    tokens_BxT: types.Array,
    ids_BxT: types.Array | None,
    learn_BxT: types.Array,
    state: None,
  ) -> tuple[types.Array, InContextState, dict[str, Any]]:
    """Rows from their start: one scan a level, then the open micro-chunk."""
    del state
    batch, tokens = tokens_BxT.shape
    C = self.options.chunks[0]
    count = (tokens - 1) // C  # Micro-chunks that a later token may close.
    ids = _ids(tokens_BxT, ids_BxT)
    if self.options.nested_meta == "full":
      ids_BxT = ids  # What is kept of a text has documents.
    end_B = layers.real_span(ids > 0)[1]
    closed_B = jnp.maximum(end_B - 1, 0) // C
    targets, weights = self._targets(tokens_BxT, ids, learn_BxT)
    whole = _Unit(
      x_BxTxD,
      ids_BxT,
      targets,
      weights,
      jnp.arange(count)[None] < closed_B[:, None],
    )
    cut = lambda x: x[:, : count * C].reshape((batch, count, C) + x.shape[2:])
    units = _Unit(*jax.tree.map(cut, whole[:4]), whole.there)
    rest = jax.tree.map(lambda x: x[:, count * C :], whole[:2])
    start = self.split(self.base.init_state(params, 1, tokens).layers)[1]
    start = jax.tree.map(lambda x: x[:, 0], start)

    def row(units: _Unit, rest: tuple) -> Any:
      at, (begin, now), (logits, metrics) = self._read(params, start, units)
      if self.options.reset == "document" and count and rest[1] is not None:
        new = (rest[1][0] > 0) & (rest[1][0] != units.ids_C[-1, 0])
        at = _choose(new, self._start(params, start), at)
      theta = {name: at[name].params for name in at}
      x, now, last, _ = self._fast(params, theta, now, *rest)
      total = lambda a, b: jnp.sum(a, axis=0) + b
      metrics = jax.tree.map(total, metrics, last)
      logits = logits.reshape((count * C,) + logits.shape[2:])
      return at, begin, now, logits, x, metrics

    at, begin, now, logits, x, metrics = jax.vmap(
      row, out_axes=(0, 1, 1, 0, 0, 1)
    )(units, rest)
    logits = jnp.concatenate([logits, self.base.logits(params, x)], axis=1)
    buffer = self._open(x_BxTxD, tokens_BxT, ids, learn_BxT, closed_B, end_B)
    seen = jnp.sum(ids > 0, axis=1, dtype=jnp.int32)
    mixers = {"slow": None, "begin": begin, "now": now}
    return logits, InContextState(mixers, at, buffer, seen), metrics

  def _read(
    self, params: types.Params, start: Any, units: _Unit
  ) -> tuple[runner.State, Any, Any]:
    """The micro-chunks of one sequence that may be closed in this call."""
    made, loss_fn = self._levels(params), self._loss(params, True)
    first_order = self.options.outer == "first_order"
    at, carry = self._start(params, start), (start, start)
    if self.options.reset == "sequence" or units.ids_C is None:
      return runner.nested_scan(
        loss_fn, made, at, carry, units, fresh=True, first_order=first_order
      )
    # A document begins with a micro-chunk, and with fast weights anew.
    first = units.ids_C[:, 0]
    before = jnp.concatenate([first[:1], first[:-1]])
    anew = self._start(params, start)

    def step(held: Any, scanned: Any) -> tuple[Any, Any]:
      (at, carry), (unit, new) = held, scanned
      at = _choose(new, anew, at)
      at, carry, output = runner.nested_step(
        loss_fn, made, at, carry, unit, first_order=first_order
      )
      return (at, carry), output

    new = (first != before) & (first > 0)
    step = jax.checkpoint(step, prevent_cse=False)
    (at, carry), output = jax.lax.scan(step, (at, carry), (units, new))
    return at, carry, output

  def _targets(
    self, tokens: types.Array, ids: types.Array, learn: types.Array
  ) -> tuple[types.Array, types.Array]:
    """Targets [B,T] and their weights: the next token of the document."""
    after = lambda x: jnp.concatenate(
      [x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1
    )
    same = (ids > 0) & (after(ids) == ids)
    if self.options.targets == "inside":
      C = self.options.chunks[0]
      same &= (jnp.arange(tokens.shape[1]) % C != C - 1)[None]
    return after(tokens), jnp.where(same, learn, 0)

  def _open(
    self,
    x_BxTxD: types.Array,
    tokens: types.Array,
    ids: types.Array,
    learn: types.Array,
    closed_B: types.Array,
    end_B: types.Array,
  ) -> Buffer:
    """The micro-chunk that stays open in each row."""
    C = self.options.chunks[0]
    phase_B = end_B - closed_B * C
    there = jnp.arange(C)[None] < phase_B[:, None]

    def cut(x: types.Array) -> types.Array:
      x = jnp.pad(x, [(0, 0), (0, C)] + [(0, 0)] * (x.ndim - 2))
      take = lambda row, i: jax.lax.dynamic_slice_in_dim(row, i * C, C)
      return jax.vmap(take)(x, closed_B)

    ids = jnp.where(there, cut(ids), 0)
    real = lambda x: _where_rows(ids > 0, cut(x), 0)
    return Buffer(real(x_BxTxD), real(tokens), ids, real(learn), phase_B)

  def _go_on(
    self,
    params: types.Params,
    x_BxTxD: types.Array,
    tokens_BxT: types.Array,
    ids_BxT: types.Array | None,
    learn_BxT: types.Array,
    state: InContextState,
  ) -> tuple[types.Array, InContextState, dict[str, Any]]:
    """Rows from wherever they stand, in pieces that end with micro-chunks."""
    batch, tokens = tokens_BxT.shape
    C, by_document = self.options.chunks[0], self.options.reset == "document"
    documents = ids_BxT is not None and by_document
    if ids_BxT is None:
      ids_BxT = jnp.broadcast_to(
        jnp.maximum(_segment(state.buffer), 1)[:, None], (batch, tokens)
      )
    begin_B, end_B = layers.real_span(ids_BxT > 0)
    width = min(tokens, C)
    # Documents may begin, and end micro-chunks, anywhere.
    count = tokens if documents else 1 + -(-(tokens - 1) // C)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, width)] + [(0, 0)] * (x.ndim - 2))
    call = tuple(map(pad, (x_BxTxD, tokens_BxT, ids_BxT, learn_BxT)))
    take = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, width))
    rows = jnp.arange(batch)[:, None]

    def piece(held: Any, _: None) -> tuple[Any, Any]:
      at, begin, now, buffer, out, offset_B = held
      x, ids_tokens, ids, learn = (take(part, offset_B) for part in call)
      more = offset_B < end_B
      blank = jnp.zeros_like(more)
      if by_document:
        # Micro-chunks end with their document; what is between is no part.
        blank = ids[:, 0] == 0
        inside = jnp.cumprod(ids == ids[:, :1], axis=1, dtype=jnp.int32)
        before, more = _segment(buffer), more & ~blank
        new = more & (before > 0) & (ids[:, 0] != before)
        anew = jax.vmap(lambda x: self._start(params, x), in_axes=1)(now)
        at = _choose(new, anew, at)
        buffer = jax.tree.map(lambda x: _where_rows(~new, x, 0), buffer)
        begin = _choose(new, now, begin, axis=1)
      due = more & (buffer.phase_B == C)
      at, begin, buffer = jax.lax.cond(
        jnp.any(due),
        functools.partial(self._close, params),
        lambda at, begin, now, buffer, *_: (at, begin, buffer),
        *(at, begin, now, buffer, due, ids_tokens[:, 0], ids[:, 0]),
      )
      room_B = jnp.where(blank, width, C - buffer.phase_B)
      size_B = jnp.clip(jnp.minimum(end_B - offset_B, room_B), 0, width)
      if by_document:
        size_B = jnp.minimum(size_B, inside.sum(axis=1, dtype=jnp.int32))
      real = jnp.arange(width)[None] < size_B[:, None]
      ids = jnp.where(real, ids, 0)
      y, now, metrics = self._forward(params, at, now, x, ids)
      added_B = jnp.where(blank, 0, size_B)
      buffer = _append(buffer, (x, ids_tokens, ids, learn), added_B)
      place = jnp.where(
        real, offset_B[:, None] + jnp.arange(width)[None], tokens
      )
      out = out.at[rows, place].set(y, mode="drop")
      return (at, begin, now, buffer, out, offset_B + size_B), metrics

    held = (
      state.levels,
      state.layers["begin"],
      state.layers["now"],
      state.buffer,
      jnp.zeros_like(x_BxTxD),
      begin_B,
    )
    held, metrics = jax.lax.scan(piece, held, None, length=count)
    at, begin, now, buffer, out, _ = held
    seen = jnp.sum(ids_BxT > 0, axis=1, dtype=jnp.int32)
    mixers = {"slow": None, "begin": begin, "now": now}
    return (
      self.base.logits(params, out),
      InContextState(mixers, at, buffer, state.position_B + seen),
      jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics),
    )

  def _forward(
    self,
    params: types.Params,
    at: runner.State,
    now: Any,
    x: types.Array,
    ids: types.Array,
  ) -> tuple[types.Array, Any, dict[str, Any]]:
    """The fast layers of all rows, each with its own fast weights."""
    theta = {name: at[name].params for name in at}
    run = lambda theta, now, x, ids: self._fast(params, theta, now, x, ids)[:3]
    return jax.vmap(run, in_axes=(0, 1, 0, 0), out_axes=(0, 1, 1))(
      theta, now, x, ids
    )

  def _close(
    self,
    params: types.Params,
    at: runner.State,
    begin: Any,
    now: Any,
    buffer: Buffer,
    due_B: types.Array,
    next_token_B: types.Array,
    next_id_B: types.Array,
  ) -> tuple[runner.State, Any, Buffer]:
    """Closes the full micro-chunks of the rows that are due."""
    behind = lambda x, last: jnp.concatenate([x, last[:, None]], axis=1)
    targets, weights = self._targets(
      behind(buffer.tokens_BxC, next_token_B),
      behind(buffer.ids_BxC, next_id_B),
      behind(buffer.learn_BxC, jnp.zeros_like(buffer.learn_BxC[:, 0])),
    )
    units = _Unit(
      buffer.x_BxCxD, buffer.ids_BxC, targets[:, :-1], weights[:, :-1], due_B
    )
    made, loss_fn = self._levels(params), self._loss(params, False)

    def row(at: runner.State, begin: Any, unit: _Unit) -> runner.State:
      return runner.nested_step(
        loss_fn,
        made,
        at,
        (begin, begin),
        unit,
        first_order=self.options.outer == "first_order",
      )[0]

    at = jax.vmap(row, in_axes=(0, 1, 0))(at, begin, units)
    begin = _choose(due_B, now, begin, axis=1)
    empty = lambda x: _where_rows(~due_B, x, 0)
    return at, begin, jax.tree.map(empty, buffer)


def _ids(
  tokens_BxT: types.Array, segment_ids: types.Array | None
) -> types.Array:
  """Documents [B,T] of a call; without them all tokens are real."""
  return jnp.ones_like(tokens_BxT) if segment_ids is None else segment_ids


def _joined(slow: dict[str, Any], fast: dict[str, Any]) -> dict[str, Any]:
  """Metrics of all layers; those of levels are of the fast layers only."""
  join = lambda a, b: jnp.concatenate([a, b])
  both = {name: jax.tree.map(join, slow[name], fast[name]) for name in slow}
  return {**fast, **both}


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


def _erase(
  theta: Mapping[str, types.Params],
  read: Mapping[str, Any],
  weights_C: types.Array,
) -> types.Array:
  """1/2 sum_t w_t |sg(u_t) W|² over all kernels of the fast levels."""
  total = 0.0
  for name, kernels in theta.items():
    for kernel, w in kernels.items():
      u = read[name]["hidden" if kernel == "w_down" else "x"]
      u = jax.lax.stop_gradient(u).astype(w.dtype)
      square = jnp.square(jnp.einsum("lca,lab->lcb", u, w))
      total += 0.5 * jnp.einsum("c,lcb->", weights_C.astype(w.dtype), square)
  return total


def _segment(buffer: Buffer) -> types.Array:
  """int32 [B], the document of the last token; 0 before the first."""
  last = jnp.maximum(buffer.phase_B - 1, 0)[:, None]
  return jnp.take_along_axis(buffer.ids_BxC, last, axis=1)[:, 0]


def _append(
  buffer: Buffer, new: tuple[types.Array, ...], size_B: types.Array
) -> Buffer:
  """The first `size_B` of the new tokens behind those of the buffer.

  Args:
    buffer: with room for them.
    new: x [B,W,D], tokens, ids and learn [B,W]; ids 0 at padding.
    size_B: padding inside included.
  """
  real = new[2] > 0
  rows = jnp.arange(real.shape[0])[:, None]
  place = buffer.phase_B[:, None] + jnp.arange(real.shape[1])[None]
  place = jnp.where(real, place, buffer.ids_BxC.shape[1])
  put = lambda old, x: old.at[rows, place].set(x, mode="drop")
  parts = [put(old, x) for old, x in zip(buffer[:4], new)]
  return Buffer(*parts, buffer.phase_B + size_B)


def _where_rows(keep: types.Array, x: types.Array, other: int) -> types.Array:
  """x where `keep` [B] or [B,C] is true, over its trailing axes."""
  shape = keep.shape + (1,) * (x.ndim - keep.ndim)
  return jnp.where(keep.reshape(shape), x, jnp.asarray(other, x.dtype))


def _choose(rows: types.Array, new: Any, old: Any, axis: int = 0) -> Any:
  """Some rows of `new`, the others of `old`; scalar `rows`: all or none."""

  def one(x: types.Array, y: types.Array) -> types.Array:
    if rows.ndim == 0:
      return jnp.where(rows, x, y)
    shape = [1] * y.ndim
    shape[axis] = rows.shape[0]
    return jnp.where(rows.reshape(shape), x, y)

  return jax.tree.map(one, new, old)
