"""How a kernel of the walk sees its arrays: blocks, rows and lanes.

A step of the grid is (row, head group, group of `save` chunks). Heads are
packed along lanes, so a step's heads are a slice of them; one number a token
and head (d = 1) is laid as rows [B,H/G,N,G,C] outside and turned into columns
inside, by sums under a mask.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nl_jax.kernels.walk import contract, products

_f32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class How:
  """What is static.

  Attributes:
    body: the chunk function.
    tile: its products.
    chunk: C.
    heads: of a step, G.
    save: chunks of a step.
    name: of the kernels, before "_fwd" and "_bwd".
    limit: bytes of VMEM.
    interpret: as `pallas_call` takes it.
  """

  body: contract.Body
  tile: products.Tile
  chunk: int
  heads: int
  save: int
  name: str
  limit: int
  interpret: Any


def lay(x: jax.Array, heads: int, how: How) -> jax.Array:
  """[B,N*C,H*d] as a kernel takes it."""
  if x.shape[-1] != heads:
    return x
  x = x.reshape(x.shape[0], -1, how.chunk, heads // how.heads, how.heads)
  return x.transpose(0, 3, 1, 4, 2)


def unlay(x: jax.Array) -> jax.Array:
  """Back to [B,N*C,H*d]."""
  if not _is_row(x):
    return x
  x = x.transpose(0, 2, 4, 1, 3)
  return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1)


def _is_row(x: Any) -> bool:
  return x.ndim == 5


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
  """The index along an axis, int32 of the whole shape."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _diagonal(how: How) -> jax.Array:
  shape = (how.heads, how.chunk, how.chunk)
  return iota(shape, 1) == iota(shape, 2)


def _tokens(ref: Any, i: Any, how: How) -> tuple[Any, ...]:
  """Where the tokens of a step's chunk i are."""
  if _is_row(ref):
    return 0, 0, i
  C = how.chunk
  start = i * C if isinstance(i, int) else pl.multiple_of(i * C, C)
  return 0, pl.ds(start, C)


def load(ref: Any, i: Any, how: How) -> jax.Array:
  """[G,C,d] of a step's chunk i, float32."""
  x = ref[_tokens(ref, i, how)].astype(_f32)
  if _is_row(ref):
    x = jnp.where(_diagonal(how), x[:, None, :], 0.0)
    return jnp.sum(x, -1, keepdims=True)
  d = x.shape[-1] // how.heads
  return jnp.stack([x[:, h * d : (h + 1) * d] for h in range(how.heads)])


def store(ref: Any, i: Any, how: How, x: jax.Array) -> None:
  """[G,C,d] into a step's chunk i."""
  if _is_row(ref):
    x = jnp.sum(jnp.where(_diagonal(how), x, 0.0), -2)
  else:
    x = jnp.concatenate([x[h] for h in range(how.heads)], axis=-1)
  ref[_tokens(ref, i, how)] = x.astype(ref.dtype)


def _by_rows(ref: Any, step: Callable[[Any], None]) -> None:
  """A step for 32 rows, or all, of each [a,b] of a block [..., G,a,b].

  In a loop: what a kernel does once a walk would else be as much code as the
  chunk.
  """
  lead, a = (0,) * (len(ref.shape) - 3), ref.shape[-2]
  size = 32 if a % 32 == 0 else a
  each = a // size

  def run(i: jax.Array, _: None) -> None:
    rows = pl.ds(pl.multiple_of(i % each * size, size), size)
    step((*lead, i // each, rows))

  jax.lax.fori_loop(0, ref.shape[-3] * each, run, None)


def clear(refs: Any) -> None:
  """0 into blocks [1,G,a,b] or [G,a,b]."""
  for ref in jax.tree.leaves(refs):

    def zero(at: Any, ref: Any = ref) -> None:
      ref[at] = jnp.zeros_like(ref[at])

    _by_rows(ref, zero)


def move(to: Any, refs: Any) -> None:
  """Blocks into others of their shape."""
  for ref, other in zip(jax.tree.leaves(to), jax.tree.leaves(refs)):

    def one(at: Any, ref: Any = ref, other: Any = other) -> None:
      ref[at] = other[at]

    _by_rows(ref, one)


def add(to: Any, refs: Any) -> None:
  """Blocks added to others of their shape."""
  for ref, other in zip(jax.tree.leaves(to), jax.tree.leaves(refs)):

    def one(at: Any, ref: Any = ref, other: Any = other) -> None:
      ref[at] += other[at]

    _by_rows(ref, one)


def copy(to: Any, values: Any) -> None:
  """Values into refs; their leading axes of one may differ."""
  for ref, value in zip(jax.tree.leaves(to), jax.tree.leaves(values)):
    ref[...] = value.reshape(ref.shape).astype(ref.dtype)


def own(refs: Any) -> Any:
  """Values of blocks [1, ...]."""
  return jax.tree.map(lambda ref: ref[0], refs)


class Specs:
  """Block specs of arrays by what they are; `back`: groups in reverse."""

  def __init__(self, how: How, heads: int, groups: int, back: bool):
    self._how, self._heads = how, heads
    self._at = (lambda j: groups - 1 - j) if back else (lambda j: j)

  def words(self, _: Any) -> pl.BlockSpec:
    """[B,N/g,1,g]: of an SMEM block the last two axes are whole."""
    return pl.BlockSpec(
      (None, None, 1, self._how.save),
      lambda b, h, j: (b, self._at(j), 0, 0),
      memory_space=pltpu.SMEM,
    )

  def ids(self, _: Any) -> pl.BlockSpec:
    """[B,N,1,C]."""
    return pl.BlockSpec(
      (1, self._how.save, 1, self._how.chunk),
      lambda b, h, j: (b, self._at(j), 0, 0),
    )

  def tokens(self, x: Any) -> pl.BlockSpec:
    """[B,N*C,H*d], or [B,H/G,N,G,C]."""
    how = self._how
    block: tuple[int, ...]
    if _is_row(x):
      block = (1, 1, how.save, how.heads, how.chunk)
      return pl.BlockSpec(block, lambda b, h, j: (b, h, self._at(j), 0, 0))
    width = x.shape[-1] // self._heads * how.heads
    block = (1, how.save * how.chunk, width)
    return pl.BlockSpec(block, lambda b, h, j: (b, self._at(j), h))

  # What stands still along the walk needs no second buffer.
  def slow(self, x: Any) -> pl.BlockSpec:
    """[H,a,b]."""
    return pl.BlockSpec(
      (self._how.heads, *x.shape[1:]),
      lambda b, h, j: (h, 0, 0),
      pipeline_mode=pl.Buffered(1),
    )

  def own(self, x: Any) -> pl.BlockSpec:
    """[B,H,a,b]."""
    return pl.BlockSpec(
      (1, self._how.heads, *x.shape[2:]),
      lambda b, h, j: (b, h, 0, 0),
      pipeline_mode=pl.Buffered(1),
    )

  def saved(self, x: Any) -> pl.BlockSpec:
    """[B,N/g,H,a,b]."""
    return pl.BlockSpec(
      (1, 1, self._how.heads, *x.shape[3:]),
      lambda b, h, j: (b, self._at(j), h, 0, 0),
    )

  def of(self, kinds: dict[str, str], arrays: dict[str, Any]) -> Any:
    """Specs of trees by name; `kinds` says which method is whose."""
    return {
      name: jax.tree.map(getattr(self, kinds[name]), tree)
      for name, tree in arrays.items()
    }
