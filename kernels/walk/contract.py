"""What a walk and a chunk function say to each other.

    body(slow, state, x, at) -> (state, y, sums)

is the chunk function of a memory: from the fast weights at the start of a
chunk and the chunk's inputs to the fast weights at its end and the outputs.
Leading axes are [B,H] in the XLA form and [G], the heads of a step, in a
kernel:

    slow    leaves [..., a, b], slow parameters, copied to rows already
    state   `State`, leaves [..., a, b]
    x, y    leaves [..., C, d]
    at      `At`
    sums    [..., 1, n], metrics to be added up over chunks, or None
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.kernels.walk import products

Body = Callable[..., tuple[Any, Any, jax.Array | None]]


class State(NamedTuple):
  """Fast weights; both are set to 0 where a document begins.

  Attributes:
    w: tree of [B,H,a,b], at least float32: what has a gradient point, the
      weights at the last chunk edge. Deviations from a learned start, so that
      0 is the start.
    s: tree of [B,H,a,b]: momentum, windows; without a gradient point. The XLA
      form also takes leaves [B, ...] of any shape and type in both.
  """

  w: Any
  s: Any


class Places(NamedTuple):
  """Where the tokens of a call stand: N chunks of C places a row.

  Attributes:
    real: bool [B,N,C], a token and not padding. Kernels need the real tokens
      of a chunk to stand next to each other.
    resets: bool [B,N], a document begins with the chunk's first token; None:
      none does.
    closes: bool [B,N], the row's chunk is full after these C places.
    ids: int32 [B,N,C], document of each token, counted within the chunk; 0 is
      the one that the chunk begins in. None: none begins inside a chunk.
    first: bool [B,N], these places begin a chunk. None: all do.
  """

  real: jax.Array
  resets: jax.Array | None
  closes: jax.Array
  ids: jax.Array | None = None
  first: jax.Array | None = None


def from_begins(
  tokens: int, chunk: int, begins: jax.Array | None, batch: int
) -> Places:
  """Places of T tokens a row, none of them padding, in chunks of C.

  Args:
    tokens: T; the last chunk is filled up with places that are not real.
    chunk: C.
    begins: bool [B,T], tokens that begin a document; None: none does.
    batch: B.
  """
  count = -(-tokens // chunk)
  grid = (batch, count, chunk)
  real = jnp.arange(count * chunk).reshape(1, count, chunk) < tokens
  places = Places(
    real=jnp.broadcast_to(real, grid),
    resets=None,
    closes=jnp.ones(grid[:2], bool),
  )
  if begins is None:
    return places
  begins = jnp.pad(begins, [(0, 0), (0, count * chunk - tokens)]).reshape(grid)
  inside = jnp.cumsum(begins.at[..., 0].set(False), axis=-1, dtype=jnp.int32)
  return places._replace(
    resets=begins[..., 0], ids=inside if chunk > 1 else None
  )


class At(NamedTuple):
  """Where a chunk function is; all of the state's type, leading axes full.

  Attributes:
    real: [..., C, 1] of 0 and 1. Inputs of other places are 0.
    ids: [..., 1, C], as `Places`, or None.
    resets, closes, first: [..., 1, 1] of 0 and 1.
    anchor: tree like `State.w`, the weights at the last chunk edge; None where
      they equal the state's.
    tile: where the function runs, and its products (static).
  """

  real: jax.Array
  ids: jax.Array | None
  resets: jax.Array
  closes: jax.Array
  first: jax.Array
  anchor: Any
  tile: products.Tile


def check(
  made: Any, state: State, at: At, name: str
) -> tuple[Any, Any, jax.Array | None]:
  """Checks what a chunk function returned, so that the walk can continue.

  Args:
    made: what it returned; only shapes and types are read.
    state, at: what it was given.
    name: of the walk.

  Raises:
    ValueError: no triple, another state, or sums without their axis of 1.
  """
  if not isinstance(made, tuple) or len(made) != 3:
    raise ValueError(
      f"{name}: a chunk function returns (state, y, sums), sums may be None"
    )
  told = lambda tree: jax.tree.map(lambda x: f"{x.dtype}{[*x.shape]}", tree)
  if told(made[0]) != told(state):
    raise ValueError(
      f"{name}: from the state {told(state)} the chunk function makes "
      f"{told(made[0])}"
    )
  sums = made[2]
  lead = at.real.shape[:-2]
  if sums is not None and sums.shape[:-1] != (*lead, 1):
    raise ValueError(
      f"{name}: sums of a chunk function are [{', '.join(map(str, lead))}, 1, "
      f"n], got {[*sums.shape]}"
    )
  return made
