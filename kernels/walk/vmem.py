"""How much VMEM a step of a kernel needs, before the compiler says so.

Blocks are exact. What the chunk function's derivative holds beside them is
read off its equations, in their order: the most that is alive at once. Of that
the compiler for v5e needs 0.05 to 0.6 where products are one to three passes,
and 0.9 to 2.2 at full precision, for which operands are split.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core

from nl_jax.kernels import placement
from nl_jax.kernels.walk import blocks, pallas

_LIKE = ("v5e", 128 * 2**20)  # Where no TPU is meant.
_ALIVE = {False: 0.6, True: 1.5}  # By whether products are of full precision.


def chip() -> tuple[str, int]:
  """Name and VMEM, bytes a core, of the chip that the program is for."""
  if placement.platform() != "tpu":
    return _LIKE
  info = pltpu.get_tpu_info()
  return str(info.chip_version), info.vmem_capacity_bytes


def need(
  how: blocks.How, slow: Any, xs: Any, state: Any, ids: Any = None
) -> int:
  """Bytes of VMEM of a step of the backward kernel, about; args as `walk`."""
  G, C, g = how.heads, how.chunk, how.save
  step = pallas.step(how, slow, xs, state, ids)
  of = lambda tree: sum(_bytes(*x.shape) for x in jax.tree.leaves(tree))

  def tokens(x: jax.ShapeDtypeStruct, dtype: jnp.dtype) -> int:
    d = x.shape[-1]
    shape = (g, G, C) if d == 1 else (g * C, G * d)
    return 2 * _bytes(*shape, dtype=dtype)  # One is filled, one worked on.

  x = jax.tree.map(lambda s, x: tokens(s, x.dtype), step.x, xs)
  y = jax.tree.map(lambda s: tokens(s, jnp.float32), step.y)
  blocks = 2 * sum(jax.tree.leaves(x)) + sum(jax.tree.leaves(y))
  # Of the state: what is saved, twice; the cotangents that come and that go;
  # the starts of the chunks of a step. Of slow: itself and its cotangent.
  copies = 4 + (g if g > 1 else 0)
  blocks += copies * of(step.state) + of(step.state.w) + 2 * of(step.slow)
  full = how.tile.policy.state == "full"
  return blocks + int(_ALIVE[full] * _alive(pallas.derivative(how, step)))


def _bytes(*shape: int, dtype: Any = jnp.float32) -> int:
  """Of an array in VMEM: its last two axes fill whole tiles of 8 x 128."""
  *lead, a, b = shape
  tiles = -(-a // 8) * -(-b // 128)
  return math.prod(lead) * tiles * 1024 * jnp.dtype(dtype).itemsize


def _size(of: core.Var) -> int:
  shape = getattr(of.aval, "shape", ())
  return _bytes(*shape) if len(shape) > 1 else 0


def inner(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
  """The equations that an equation runs."""
  for x in equation.params.values():
    if isinstance(x, core.ClosedJaxpr):
      yield x.jaxpr
    elif isinstance(x, core.Jaxpr):
      yield x


def _alive(jaxpr: core.Jaxpr) -> int:
  """The most bytes that its equations hold at once, beside its inputs."""
  variables = lambda xs: {x for x in xs if isinstance(x, core.Var)}
  last: dict[core.Var, int] = {}
  for i, equation in enumerate(jaxpr.eqns):
    last |= dict.fromkeys(variables(equation.invars), i)
  made: dict[Any, int] = {}
  most = 0
  last |= dict.fromkeys(variables(jaxpr.outvars), len(jaxpr.eqns))
  for i, equation in enumerate(jaxpr.eqns):
    within = max(map(_alive, inner(equation)), default=0)
    out = {x: _size(x) for x in equation.outvars}
    most = max(most, sum(made.values()) + max(within, sum(out.values())))
    made = {x: n for x, n in (made | out).items() if last.get(x, i) > i}
  return most
