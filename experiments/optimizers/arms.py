"""The arms of the optimizer comparison (spec 6.1-6.3).

Every arm is a rule for the matrices of the blocks; all other leaves take AdamW
with learning rate 3e-3, b2 .95 and no decay, whatever the arm. Those of STARTS
are public optimizers as they stand, for all leaves, at the rates that
docs/optimizers.md says to start with.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nl_jax import optim

REST_RATE = 3e-3
DECAY = 0.1
DIMS = optax.contrib.MuonDimensionNumbers(-2, -1)


@dataclasses.dataclass(frozen=True)
class Arm:
  """One optimizer: its rule by b1, and its own decade of rates.

  Attributes:
    rule: b1 -> a `scale_by_*` transformation.
    rates: learning rates, a factor of sqrt(10) apart; --full adds one at
      either end.
    shaped: whether updates are scaled by 0.2 sqrt(max(c, r)).
    b1: of the short run; --full tries B1S.
  """

  rule: Callable[[Any], optax.GradientTransformation]
  rates: tuple[float, ...]
  shaped: bool = True
  b1: float = 0.9


B1S = (0.8, 0.9, 0.95)
_ADAM = (1e-3, 3e-3, 1e-2)
_MUON = (3e-3, 1e-2, 3e-2)


def _m3(**kw: Any) -> Callable[[Any], optax.GradientTransformation]:
  return lambda b1: optim.scale_by_m3(b1, dims=DIMS, **kw)


def _then_ns(
  make: Callable[[Any], optax.GradientTransformation],
) -> Callable[[Any], optax.GradientTransformation]:
  ns = optim.orthogonal_preconditioner(DIMS)
  return lambda b1: optax.chain(make(b1), ns)


ARMS = {
  "adamw": Arm(lambda b1: optax.scale_by_adam(b1, 0.95), _ADAM, shaped=False),
  "muon": Arm(_m3(alpha=None, second_moment=None), _MUON),
  "muon with a second moment": Arm(_m3(alpha=None), _MUON),
  "m3": Arm(_m3(slow_every=10), _MUON),
  "delta momentum, NS": Arm(
    _then_ns(lambda b1: optim.scale_by_delta_momentum(b1, dims=DIMS)), _MUON
  ),
  "deep momentum, NS": Arm(
    lambda b1: optim.scale_by_deep_momentum(
      target_decay=b1, output="orthogonalize", dims=DIMS
    ),
    _MUON,
  ),
  "momentum": Arm(lambda b1: optax.trace(b1), (1e-2, 3e-2, 1e-1), shaped=False),
  "lion": Arm(
    lambda b1: optax.scale_by_lion(b1, 0.99), (1e-4, 3e-4, 1e-3), shaped=False
  ),
  "ademamix": Arm(
    lambda b1: optax.contrib.scale_by_ademamix(b1, 0.95, 0.99, 2.0),
    _ADAM,
    shaped=False,
  ),
  "m3, no second moment": Arm(_m3(slow_every=10, second_moment=None), _MUON),
  "m3, alpha .5": Arm(_m3(slow_every=10, alpha=0.5), _MUON),
  "m3, f 100": Arm(_m3(slow_every=100), _MUON),
  "m3, second moment of gradients": Arm(
    _m3(slow_every=10, second_moment="grad"), (1e-7, 1e-6, 1e-5)
  ),
}
SHORT = tuple(ARMS)[:6]


@dataclasses.dataclass(frozen=True)
class Start:
  """A public optimizer, all of it at its defaults.

  Attributes:
    make: (learning rate, b1) -> the optimizer of all leaves.
    rate: the learning rate to start with.
    b1s: those that are tried, its own first.
  """

  make: Callable[[optax.Schedule, Any], optax.GradientTransformation]
  rate: float
  b1s: tuple[float, ...] = (0.9,)


STARTS = {
  "optim.m3": Start(optim.m3, 1e-2, (0.8, 0.9, 0.95)),
  "optim.muon": Start(optim.muon, 1e-2, (0.8,)),
  "optim.delta_momentum": Start(optim.delta_momentum, 0.1),
  "optim.deep_momentum": Start(
    lambda rate, b1: optim.deep_momentum(rate, target_decay=b1), 0.3
  ),
  "optim.adam_memory": Start(optim.adam_memory, 3e-3),
  "optim.adagrad_memory": Start(
    lambda rate, b1: optim.adagrad_memory(rate), 0.1, (0.0,)
  ),
  "optax.sgd": Start(lambda rate, b1: optax.sgd(rate), 0.3, (0.0,)),
}
TOPICS = ("adamw", "muon", "muon with a second moment", "m3")


def make(
  name: str, rate: jax.Array, b1: jax.Array, shape: optax.Schedule
) -> optax.GradientTransformation:
  """The optimizer of an arm: rate and b1 may be traced.

  Args:
    name: a key of ARMS or STARTS.
    rate: peak learning rate, of ARMS that of the blocks' matrices.
    b1: decay of the momentum.
    shape: schedule of the rates, at most 1.
  """
  clip = optax.clip_by_global_norm(1.0)
  if name in STARTS:
    return optax.chain(clip, STARTS[name].make(lambda t: rate * shape(t), b1))
  arm = ARMS[name]
  matrices = optax.chain(
    arm.rule(b1),
    optim.scale_by_shape(DIMS, 0.2) if arm.shaped else optax.identity(),
    optax.add_decayed_weights(DECAY),
    optax.scale_by_schedule(lambda t: -rate * shape(t)),
  )
  rest = optax.adamw(
    lambda t: jnp.asarray(REST_RATE) * shape(t), b2=0.95, weight_decay=0.0
  )

  def labels(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: (
        "matrix" if path[0].key == "blocks" and x.ndim == 3 else "rest"
      ),
      params,
    )

  return optax.chain(
    clip,
    optax.partition({"matrix": matrices, "rest": rest}, labels),
  )
