"""Deep momentum: a memory of gradients that is trained online (eq. 50, 52).

For a matrix leaf G (c, r) the columns u_j are the samples, c the features:

    u = G / s, s = RMS(G);  t = EMA(G) or G or 1;  v = t / RMS(t)
    f(u) = u + w_out^T act(w_in^T u),   w_out = 0 at first
    L = mean_j 1/2 |f(u_j) - v_j|^2   or   - mean_j <f(u_j), v_j>
    w_out <- alpha w_out - mu dL/dw_out,   w_in <- w_in - mu dL/dw_in
    direction s f(u), with the memory after its update ("post")

Deviation: as printed the memory maps a gradient to a number and is unbounded
below; one MLP a matrix, shared by its columns, is the form of it that is well
typed and affordable. The first update is exactly that of SGD.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nl_jax.kernels.orthogonalize import coefficients, stack
from nl_jax.optim import _checks, _dims, _dtypes, _matrices, _newton_schulz

A = jax.typing.ArrayLike
Tree = Any
ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": jax.nn.gelu,
  "relu": jax.nn.relu,
  "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class LinearMemory:
  """A linear memory of gradients; its read-out "state" is plain momentum."""


@dataclasses.dataclass(frozen=True)
class MLPMemory:
  """f(u) = u + w_out^T act(w_in^T u), one for each matrix.

  Attributes:
    hidden: width, or a fraction of the fan-in (then at least 4); 0 is none.
    depth: 2, or 1 for f(u) = u + w_out^T u.
    activation: "silu", "gelu", "relu" or "tanh".
    residual: whether u is added.
    seed: seed of w_in, folded with the path of the leaf.
  """

  hidden: float | int = 0.25
  depth: int = 2
  activation: str = "silu"
  residual: bool = True
  seed: int = 0

  def __post_init__(self):
    _checks.one_of("depth", self.depth, (1, 2))
    _checks.one_of("activation", self.activation, tuple(ACTIVATIONS))
    if self.hidden < 0:
      raise ValueError(f"hidden must be >= 0, got {self.hidden}")

  @property
  def names(self) -> tuple[str, ...]:
    """The weights of a memory, in the order of a dict's leaves."""
    return ("w_in", "w_out") if self.depth == 2 else ("w_out",)

  def width(self, c: int) -> int:
    """Hidden units of a memory of c features."""
    if self.depth == 1:
      return c
    if isinstance(self.hidden, int) or not self.hidden:
      return int(self.hidden)
    return max(4, round(self.hidden * c))

  def init(self, path: str, batch: tuple[int, ...], c: int, dtype: Any) -> dict:
    """Weights {"w_in": (*batch, c, M), "w_out": (*batch, M, c)}."""
    M = self.width(c)
    weights = {"w_out": jnp.zeros((*batch, M, c), dtype)}
    if self.depth == 2:
      key = jax.random.key(self.seed)
      key = jax.random.fold_in(key, zlib.crc32(path.encode()))
      w_in = jax.random.normal(key, (*batch, c, M), dtype)
      weights["w_in"] = w_in * c**-0.5
    return weights

  def hidden_units(self, weights: dict, u: jax.Array) -> tuple:
    """(h [S, M, r], pull-back from h to the pre-activations or None)."""
    if self.depth == 1:
      return u, None
    return jax.vjp(ACTIVATIONS[self.activation], weights["w_in"].mT @ u)

  def read(self, weights: dict, h: jax.Array, u: jax.Array) -> jax.Array:
    """f(u) from its hidden units."""
    y = weights["w_out"].mT @ h
    return u + y if self.residual else y


class ScaleByDeepMomentumState(NamedTuple):
  """State of `scale_by_deep_momentum`.

  Attributes:
    count: int32 scalar.
    memory: like the parameters for a linear memory; for `MLPMemory` a matrix
      leaf holds {"w_in", "w_out"}, others what `vector_rule` needs.
    target: EMA of the gradients, or () where nothing reads it.
  """

  count: jax.Array  # type: ignore[assignment]  # Of tuples a method.
  memory: Tree
  target: Tree


class _Rule(NamedTuple):
  """The numbers and switches of the inner problem."""

  alpha: A
  inner_lr: A
  eta: A
  normalized: bool
  loss: str
  read: str
  decay_all: bool


def _rms(x: jax.Array) -> jax.Array:
  mean = jnp.mean(x * x, axis=(-2, -1), keepdims=True)
  return _dtypes.safe_sqrt(mean)


def _mlp_step(
  memory: MLPMemory, weights: dict, u: jax.Array, v: jax.Array, rule: _Rule
) -> tuple[jax.Array, dict]:
  """(f(u), new weights); u and v are [S, c, r], columns are samples."""
  r = u.shape[-1]
  h, pull = memory.hidden_units(weights, u)
  y = memory.read(weights, h, u)
  error = (y - v if rule.loss == "l2" else -v) / r
  mu = rule.inner_lr
  if rule.normalized:
    power = jnp.sum(h * h, axis=(-2, -1), keepdims=True) / r
    mu = mu / (1e-6 + power)
  new = {"w_out": rule.alpha * weights["w_out"] - mu * (h @ error.mT)}
  if pull is not None:
    (slope,) = pull(weights["w_out"] @ error)
    # w_in does not decay by default: with both layers decaying the memory
    # falls into the saddle at zero, where all its gradients vanish.
    kept = rule.alpha if rule.decay_all else 1.0
    new["w_in"] = kept * weights["w_in"] - mu * (u @ slope.mT)
  if rule.read == "post":
    h, _ = memory.hidden_units(new, u)
    y = memory.read(new, h, u)
  return y, new


def _linear_step(
  m: jax.Array, u: jax.Array, v: jax.Array, rule: _Rule
) -> tuple[jax.Array, jax.Array]:
  """Linear attention over past gradients: m [S, c, c], read m^T u."""
  new = jnp.asarray(rule.alpha * m + rule.eta * (u @ v.mT) / u.shape[-1])
  return (new if rule.read == "post" else m).mT @ u, new


def scale_by_deep_momentum(
  alpha: A = 0.995,
  inner_lr: A = 0.1,
  target_decay: A = 0.9,
  *,
  memory: MLPMemory | LinearMemory = MLPMemory(),  # noqa: B008 (frozen)
  inner_step: Literal["normalized", "gd"] = "normalized",
  loss: Literal["l2", "dot"] = "l2",
  target: Literal["ema", "self", "ones"] = "ema",
  readout: Literal["apply", "state"] | None = None,
  read: Literal["post", "pre"] = "post",
  output: str | Callable[[jax.Array], jax.Array] | None = None,
  decay_layers: Literal["output", "all"] = "output",
  vector_rule: Literal["identity", "trace", "mlp"] = "identity",
  eta: A = 1.0,
  ns_steps: int = 5,
  ns: _newton_schulz.NewtonSchulz = _newton_schulz.NewtonSchulz(),  # noqa: B008
  dims: _dims.DimsLike = None,
) -> optax.GradientTransformationExtraArgs:
  """Deep momentum gradient descent; see the module docstring.

  Scaling all gradients by k scales the direction by k. The literal form is
  target="ones", loss="dot", inner_step="gd", decay_layers="all".

  Args:
    alpha: retention of the memory.
    inner_lr: learning rate mu of the memory; "normalized" is stable below 2.
    target_decay: decay of the EMA that the memory learns, bias-corrected.
    memory: `MLPMemory(...)`, or `LinearMemory()`: with readout "state"
      m <- alpha m + eta g, with "apply" m <- alpha m + eta u v^T / r.
    inner_step: "normalized" divides mu by the mean square of the hidden units,
      "gd" does not.
    loss: "l2" or "dot".
    target: "ema", "self" (the gradient) or "ones".
    readout: "apply" (default of `MLPMemory`) or "state" (of `LinearMemory`).
    read: "post" or "pre" the memory's own update.
    output: None, "orthogonalize", or a function of one leaf's direction.
    decay_layers: "output" decays w_out alone, "all" also w_in.
    vector_rule: for leaves that are not matrices: "identity" is the gradient,
      "trace" momentum with alpha and eta, "mlp" one sample of all entries.
    eta: rate of the write of linear memories and of "trace".
    ns_steps: Newton-Schulz iterations of output="orthogonalize".
    ns: see `NewtonSchulz`.
    dims: the matrices; None is (-2, -1) for rank >= 2.

  Returns:
    A transformation with state `ScaleByDeepMomentumState`.

  Raises:
    ValueError: an unknown switch, or readout="state" of an MLP; at init,
      linear "apply" on a leaf that is not a matrix; TypeError: complex leaves.
  """
  _checks.one_of("inner_step", inner_step, ("normalized", "gd"))
  _checks.one_of("loss", loss, ("l2", "dot"))
  _checks.one_of("target", target, ("ema", "self", "ones"))
  _checks.one_of("readout", readout, (None, "apply", "state"))
  _checks.one_of("read", read, ("post", "pre"))
  _checks.one_of("decay_layers", decay_layers, ("output", "all"))
  _checks.one_of("vector_rule", vector_rule, ("identity", "trace", "mlp"))
  if not callable(output):
    _checks.one_of("output", output, (None, "orthogonalize"))
  coefficients.check(ns.coeffs, ns_steps)
  is_mlp = isinstance(memory, MLPMemory)
  if is_mlp and readout == "state":
    raise ValueError(
      "readout='state' needs LinearMemory: the state of an MLP is not a "
      "direction"
    )
  keeps_state = not is_mlp and readout != "apply"
  rule = _Rule(
    alpha, inner_lr, eta, inner_step == "normalized", loss, read,
    decay_layers == "all",
  )  # fmt: skip

  def kind(x, spec):
    """How a leaf learns: "trace", "identity" or "memory"."""
    if keeps_state:
      return "trace"
    if not x.size:
      return "identity"
    return "memory" if spec is not None or vector_rule == "mlp" else vector_rule

  def memory_of(path, p, spec):
    if kind(p, spec) == "trace":
      return _dtypes.slow(p, None)
    if kind(p, spec) == "identity":
      return ()
    if not is_mlp and spec is None:
      raise ValueError(
        "readout='apply' of LinearMemory needs matrices, got shape "
        f"{p.shape} at {path or 'the root'}; use optax.masked or readout="
        "'state'"
      )
    batch, c = (), p.size
    if spec is not None:
      batch = stack.batch_shape(p.shape, spec)
      c = stack.sizes(p.shape, spec)[0]
    if is_mlp:
      return memory.init(path, batch, c, _dtypes.wide(p))
    return jnp.zeros((*batch, c, c), _dtypes.wide(p))

  def init(params):
    _checks.inexact(params, "deep_momentum", allow_complex=False)
    specs = _dims.flat(dims, params)
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    memories = [
      memory_of(jax.tree_util.keystr(_matrices.bare(path)), p, spec)
      for (path, p), spec in zip(paths, specs)
    ]
    learns = target == "ema" and not keeps_state
    targets = [
      _dtypes.slow(p, None) if learns and kind(p, spec) == "memory" else ()
      for (_, p), spec in zip(paths, specs)
    ]
    return ScaleByDeepMomentumState(
      count=jnp.zeros([], jnp.int32),
      memory=jax.tree.unflatten(treedef, memories),
      target=jax.tree.unflatten(treedef, targets),
    )

  def update(updates, state, params=None, **extra):
    del params, extra
    count = optax.safe_increment(state.count)

    def one(g, weights, goal, spec):
      raw, g = g, g.astype(_dtypes.wide(g))
      how = kind(g, spec)
      if how == "identity":
        return g, weights, goal
      if how == "trace":
        m = alpha * weights + eta * g
        return m, m, goal
      t = g if target == "self" else jnp.ones_like(g)
      if target == "ema":
        goal = target_decay * goal + (1 - target_decay) * g
        t = _dtypes.bias_correct(goal, target_decay, count)
      G, t = (_samples(x, spec) for x in (g, t))
      s = _rms(G)
      u, v = _dtypes.safe_divide(G, s), _dtypes.safe_divide(t, _rms(t))
      S = G.shape[0]
      # What wraps a state may have made another mapping of a dict: the leaves
      # are read and written in their order.
      olds, structure = jax.tree.flatten(weights)
      flat = [w.reshape((S, *w.shape[-2:])) for w in olds]
      if is_mlp:
        names = memory.names
        y, new = _mlp_step(memory, dict(zip(names, flat)), u, v, rule)
        new = [new[name] for name in names]
      else:
        y, *new = _linear_step(*flat, u, v, rule)
      new = [w.reshape(old.shape) for w, old in zip(new, olds)]
      new = structure.unflatten(new)
      d = s * y
      d = d.reshape(g.shape) if spec is None else stack.unpack(d, g.shape, spec)
      return stack.like(d, raw), new, goal

    treedef = jax.tree.structure(updates)
    columns = (updates, state.memory, state.target)
    columns = [treedef.flatten_up_to(c) for c in columns]
    specs = _dims.flat(dims, updates)
    rows = [one(*x) for x in zip(*columns, specs)]
    new = [jax.tree.unflatten(treedef, [r[i] for r in rows]) for i in range(3)]
    direction = new[0]
    if output == "orthogonalize":
      direction = ns.orthogonalize(
        direction, jax.tree.unflatten(treedef, specs), ns_steps
      )
    elif callable(output):
      direction = jax.tree.map(output, direction)
    memories = _dtypes.cast(new[1], state.memory)
    new_state = ScaleByDeepMomentumState(count, memories, new[2])
    return _dtypes.cast(direction, updates), new_state

  return optax.GradientTransformationExtraArgs(init, update)


def _samples(x: jax.Array, spec: _dims.Spec) -> jax.Array:
  """[S, c, r]; a leaf without a spec is one sample of all its entries."""
  # Memories are replicated, so under Explicit meshes their samples are too.
  x = stack.replicated(x)
  return x.reshape((1, -1, 1)) if spec is None else stack.pack(x, spec)


def deep_momentum(
  learning_rate: optax.ScalarOrSchedule,
  alpha: A = 0.995,
  inner_lr: A = 0.1,
  weight_decay: A = 0.0,
  mask: Tree | None = None,
  *,
  fallback: optax.GradientTransformation | None = None,
  target_decay: A = 0.9,
  memory: MLPMemory | LinearMemory = MLPMemory(),  # noqa: B008 (frozen)
  inner_step: Literal["normalized", "gd"] = "normalized",
  loss: Literal["l2", "dot"] = "l2",
  target: Literal["ema", "self", "ones"] = "ema",
  readout: Literal["apply", "state"] | None = None,
  read: Literal["post", "pre"] = "post",
  output: str | Callable[[jax.Array], jax.Array] | None = None,
  decay_layers: Literal["output", "all"] = "output",
  vector_rule: Literal["identity", "trace", "mlp"] = "identity",
  eta: A = 1.0,
  ns_steps: int = 5,
  ns: _newton_schulz.NewtonSchulz = _newton_schulz.NewtonSchulz(),  # noqa: B008
  dims: _dims.DimsLike = None,
) -> optax.GradientTransformationExtraArgs:
  """Deep momentum with decoupled weight decay; see `scale_by_deep_momentum`.

  Args:
    learning_rate: a number or a schedule.
    weight_decay: decoupled, times the learning rate.
    mask: what decays, as in `optax.adamw`.
    fallback: a complete optimizer for leaves that are not matrices; None leaves
      them to `vector_rule`.
    dims: the matrices; None selects them by `matrix_dims_from_paths`.
    alpha, inner_lr, target_decay, memory, inner_step, loss, target, readout,
      read, output, decay_layers, vector_rule, eta, ns_steps, ns: see
      `scale_by_deep_momentum`.
  """
  dims = _dims.from_paths(dims)
  tx = optax.chain(
    scale_by_deep_momentum(
      alpha, inner_lr, target_decay, memory=memory, inner_step=inner_step,
      loss=loss, target=target, readout=readout, read=read, output=output,
      decay_layers=decay_layers, vector_rule=vector_rule, eta=eta,
      ns_steps=ns_steps, ns=ns, dims=dims,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )  # fmt: skip
  return tx if fallback is None else _dims.partition(tx, fallback, dims)
