"""The feed-forward part of every model: a continuum memory system (CMS).

A chain of feed-forward levels MLP^(1) … MLP^(k), fastest first, each with a
period of its own (paper eq. 70-74; docs/mathematics.md 4.1). Here is the
forward pass; when a level changes is the business of
`nl_jax.optim.multi_frequency`. One level is the plain SwiGLU feed-forward
block.

Block form [ours; the paper disregards normalisation]: a level is a pre-RMSNorm
residual SwiGLU, x ← x + MLP(RMSNorm(x)).
"""

import dataclasses
import math
from typing import Annotated, Any

import flax.linen as nn
import jax

from nl_jax import fields, sharding, types
from nl_jax.fields import OneOf, Whole
from nl_jax.models import layers
from nl_jax.models import leaves as leaf

VARIANTS = ("sequential", "nested", "independent")
_READ = "read"  # Collection of what the kernels of a level read.
MIX = "mix"  # Parameter of the weights w_ℓ of the independent variant.


@dataclasses.dataclass(frozen=True)
class Options:
  """Levels of the feed-forward part.

  Attributes:
    levels: names, fastest first (paper sec. 5, Fig. 5).
    widths: hidden units F of each level.
    periods: tokens between two updates of each level, each a multiple of the
      one before; 0: every optimizer step (Fig. 3).
    variant: "sequential" (eq. 70), "nested" (eq. 72: the same forward pass,
      faster levels restart when a slower one updates) or "independent"
      (eq. 74: a learned weighted sum of parallel levels).
    norm: each level reads RMSNorm(x); ours, unstated.
    residual: each level (or their sum) adds its input; ours, unstated.
  """

  levels: tuple[str, ...] = ("ffn",)
  widths: Annotated[tuple[int, ...], Whole(1)] = (1024,)
  periods: Annotated[tuple[int, ...], Whole(0)] = (0,)
  variant: Annotated[str, OneOf(*VARIANTS)] = "sequential"
  norm: bool = True
  residual: bool = True

  def __post_init__(self):
    fields.check("model.cms", Options, vars(self))
    count = len(self.levels)
    if not count or len(self.widths) != count or len(self.periods) != count:
      raise ValueError(
        "cms.levels, cms.widths and cms.periods must have one entry a level, "
        f"got {self.levels}, {self.widths} and {self.periods}"
      )
    self._check_names()
    for fast, slow in zip(self.periods, self.periods[1:]):
      if slow < fast or (fast and slow % fast):
        raise ValueError(
          "cms.periods go from fast to slow, each a multiple of the one "
          f"before (0 = every step, first), got {self.periods}"
        )

  def _check_names(self) -> None:
    for name in self.levels:
      if not isinstance(name, str) or not name.isidentifier() or name == MIX:
        raise ValueError(
          f"cms.levels must be identifiers other than {MIX!r}, got {name!r}"
        )
    if len(set(self.levels)) != len(self.levels):
      raise ValueError(f"cms.levels must differ, got {self.levels}")

  @property
  def mixes(self) -> bool:
    """Whether the levels' outputs are summed with learned weights."""
    return self.variant == "independent" and len(self.levels) > 1


def leaves(config: Options, width: int, depth: int) -> dict[str, leaf.Leaf]:
  """{level: {norm: {scale}, w_gate, w_up, w_down}} of one layer.

  Args:
    config: the levels.
    width: D.
    depth: layers L of the model, for the start of w_down.
  """
  made = {}
  for name, hidden in zip(config.levels, config.widths):
    if config.norm:
      made[f"{name}/norm/scale"] = leaf.scale(width, "act_embed")
    for i, (kernel, one) in enumerate(
      _kernels(width, hidden, depth).items(), 1
    ):
      one = dataclasses.replace(one, key=(leaf.linen(name, i),))
      made[f"{name}/{kernel}"] = one
  if config.mixes:
    count = len(config.levels)
    made[MIX] = leaf.constant((count,), ("level",), count**-0.5)
  return made


def _kernels(width: int, hidden: int, depth: int) -> dict[str, leaf.Leaf]:
  """Those of a level; `depth` as of `leaves`."""
  normal = jax.nn.initializers.normal
  init, down = normal(layers.INIT_STD), normal(layers.residual_std(depth))
  wide = leaf.Leaf((width, hidden), ("embed", "mlp"), init, True, True)
  back = leaf.Leaf((hidden, width), ("mlp", "embed"), down, True, True)
  return {"w_gate": wide, "w_up": wide, "w_down": back}


class FeedForward(nn.Module):
  """MLP^(ℓ)(RMSNorm_ℓ(x)), without the residual.

  Attributes:
    hidden: F.
    norm: whether there is a norm.
    epsilon: of the norm.
    gathers: each device has tokens of its own and all of the kernels.
  """

  hidden: int
  norm: bool
  epsilon: float = layers.EPSILON
  gathers: bool = False

  @nn.compact
  def __call__(self, x: types.Array) -> types.Array:
    """x [..., D] to the same shape."""
    if self.norm:
      x = layers.RMSNorm(self.epsilon, name="norm")(x)
    table = _kernels(x.shape[-1], self.hidden, 1)
    kernels = [self.param(n, w.init, w.shape) for n, w in table.items()]
    if self.gathers:
      kernels = [w.astype(x.dtype) for w in kernels]
      axes = [w.axes for w in table.values()]
      y, hidden = sharding.by_tokens(_feed_forward, x, kernels, axes)
    else:
      y, hidden = _feed_forward(x, *kernels)
    self.sow(_READ, "x", x)
    self.sow(_READ, "hidden", hidden)
    return y


def _feed_forward(
  x: types.Array, w_gate: types.Array, w_up: types.Array, w_down: types.Array
) -> tuple[types.Array, types.Array]:
  """(the output [..., D], what w_down reads [..., F])."""
  hidden = layers.gated(x, w_gate, w_up)
  return layers.dense(hidden, w_down), hidden


class CMS(nn.Module):
  """The chain or the sum of levels.

  Attributes:
    config: see `Options`.
    epsilon: of the norms.
  """

  config: Options
  epsilon: float = layers.EPSILON

  @nn.compact
  def __call__(self, x_BxTxD: types.Array) -> types.Array:
    """x_BxTxD to the same shape."""
    config = self.config
    gathers = _gathers(config, x_BxTxD)
    if gathers:  # Told both places, XLA leaves the mixer's heads split.
      x_BxTxD = _place(_place(x_BxTxD, "length"), "tokens")
    blocks = [
      FeedForward(hidden, config.norm, self.epsilon, gathers, name=name)
      for name, hidden in zip(config.levels, config.widths)
    ]
    if config.variant == "independent":
      return self._sum([block(x_BxTxD) for block in blocks], x_BxTxD)
    for block in blocks:
      y_BxTxD = block(x_BxTxD)
      x_BxTxD = x_BxTxD + y_BxTxD if config.residual else y_BxTxD
    if gathers:
      x_BxTxD = _place(_place(x_BxTxD, "tokens"), "length")
    return x_BxTxD

  def _sum(
    self, outputs: list[types.Array], x_BxTxD: types.Array
  ) -> types.Array:
    """Σ_ℓ w_ℓ y_ℓ (eq. 74), w_ℓ = 1 where there is one level."""
    count = len(outputs)
    if self.config.mixes:
      zeros = nn.initializers.zeros
      mix = self.param(MIX, zeros, (count,)).astype(x_BxTxD.dtype)
      outputs = [mix[i] * y for i, y in enumerate(outputs)]
    y_BxTxD = sum(outputs[1:], outputs[0])
    return x_BxTxD + y_BxTxD if self.config.residual else y_BxTxD


def _place(x_BxTxD: types.Array, length: str) -> types.Array:
  return sharding.constrain(x_BxTxD, "batch", length, "act_embed")


def _gathers(config: Options, x_BxTxD: types.Array) -> bool:
  """Whether `tensor` splits tokens here, and not the widths of levels.

  By widths, what a level writes is a sum over devices, for which the next one
  waits: in a step k sums forward, k - 1 recomputed and k backward, and a sum
  sends all tokens twice. By tokens the kernels are gathered, forward and
  backward, and their gradients summed: 3 x 3 F a level, and nothing waits.
  """
  here = sharding.shard_shape(x_BxTxD.shape, "batch", "tokens", "act_embed")
  beside = sharding.shard_shape(x_BxTxD.shape, "batch", "length", "act_embed")
  if here is None or beside is None or here == beside:
    return False
  if config.variant == "independent":
    return False
  tokens, sums = math.prod(beside[:2]), 3 * len(config.levels) - 1
  return 2 * sums * tokens > 9 * sum(config.widths)


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  config: Options,
  epsilon: float = layers.EPSILON,
) -> types.Array:
  """The feed-forward part of one layer, its residual included.

  Args:
    params: of one layer.
    x_BxTxD: the residual stream.
    config: the levels.
    epsilon: of the norms.
  """
  y: Any = CMS(config, epsilon).apply({"params": params}, x_BxTxD)
  return y


def apply_and_tell(
  params: types.Params,
  x_BxTxD: types.Array,
  config: Options,
  epsilon: float = layers.EPSILON,
) -> tuple[types.Array, dict[str, dict[str, types.Array]]]:
  """`apply`, and what the kernels of each level read.

  Args:
    params, x_BxTxD, config, epsilon: as of `apply`.

  Returns:
    y_BxTxD, and by level {"x": [B,T,D] of w_gate and w_up, "hidden": [B,T,F]
    of w_down}.
  """
  y_BxTxD, made = CMS(config, epsilon).apply(
    {"params": params}, x_BxTxD, mutable=[_READ]
  )
  read = {
    level: {name: value[0] for name, value in found.items()}
    for level, found in made[_READ].items()
  }
  return y_BxTxD, read


def label(path: tuple[jax.tree_util.DictKey, ...], config: Options) -> str:
  """ "cms/<level>" of a parameter of a level; "slow" for one level, and mix."""
  names = [entry.key for entry in path]
  if "cms" not in names or len(config.levels) == 1:
    return "slow"
  level = names[names.index("cms") + 1]
  return "slow" if level == MIX else f"cms/{level}"
