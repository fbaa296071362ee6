"""How the kernels of a walk are laid: heads a step, saved states, VMEM.

A row of `tiles.json` that was measured goes before what is computed here.
"""

import contextlib
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.kernels.walk import blocks, contract, pallas, products, vmem, xla

_TILES = pathlib.Path(__file__).with_name("tiles.json")
_kept: list[int] = [1]  # Walks whose states are kept at once; the last counts.
# What the states of all of them may take on a device.
KEPT_BYTES = 4 * 2**30
_MOST_KEPT = 16  # Chunks that a kernel makes again at once.


class Kernel(NamedTuple):
  """What a call asks of its kernels, beside its arrays; see `walk`.

  Attributes:
    body, policy, name, heads, save: of `walk`.
    interpret: as `pallas_call` takes it.
  """

  body: contract.Body
  policy: products.Policy
  name: str
  heads: int | None = None
  save: int | None = None
  interpret: bool = False


@contextlib.contextmanager
def kept(walks: int) -> Iterator[None]:
  """Walks traced within are of a stack that keeps the states of many at once.

  A layer whose walk is not run again in the backward pass keeps its states
  until then; `save` of `walk` follows from how many layers do.

  Args:
    walks: how many.
  """
  _kept.append(walks)
  try:
    yield
  finally:
    _kept.pop()


def plan(
  kernel: Kernel,
  slow: Any,
  xs: Any,
  places: contract.Places,
  state: contract.State,
) -> tuple[blocks.How, int]:
  """What is static in the kernels of a call, and the VMEM that a step needs.

  Args:
    kernel: what is asked.
    slow, xs, places, state: as `walk`; only shapes and types are read.

  Raises:
    ValueError: heads that a step cannot take.
  """
  N, C = places.real.shape[1:]
  H = pallas.heads_of(state)
  chip, capacity = vmem.chip()
  entry = _tile(chip, kernel.name, C, state)
  limit = int(0.8 * capacity)
  save = kernel.save or entry.get("save") or _save(N, state, kernel.policy)
  save = xla.divisor(N, save)

  def how(G: int) -> blocks.How:
    pack = max(p for p in (1, 2, 4, 8, 16) if p * C <= 128 and G % p == 0)
    return blocks.How(
      kernel.body, products.Tile(kernel.policy, fused=True, pack=pack), C, G,
      save, kernel.name, limit, kernel.interpret,
    )  # fmt: skip

  need = functools.cache(
    lambda G: vmem.need(how(G), slow, xs, state, places.ids)
  )
  may = step_heads(how(H), slow, xs, places, state)
  asked = kernel.heads or (
    entry.get("heads") if entry.get("heads") in may else None
  )
  if asked is None:
    light = [G for G in may if _light(G, C, state)] or may[:1]
    fits = (G for G in reversed(light) if need(G) <= limit)
    asked = next(fits, light[0])
  if asked not in may:
    raise ValueError(f"{kernel.name}: {no_group(asked, H, may)}")
  return how(asked), need(asked)


def _save(chunks: int, state: contract.State, policy: products.Policy) -> int:
  """Chunks between two saved states, see `KEPT_BYTES`."""
  size = lambda x: jnp.dtype(pallas.saved_dtype(policy, x)).itemsize
  one = sum(math.prod(x.shape) * size(x) for x in jax.tree.leaves(state))
  total = _kept[-1] * chunks * one
  may = [g for g in range(1, _MOST_KEPT + 1) if chunks % g == 0]
  return next((g for g in may if total / g <= KEPT_BYTES), may[-1])


def step_heads(
  how: blocks.How,
  slow: Any,
  xs: Any,
  places: contract.Places,
  state: contract.State,
) -> list[int]:
  """Heads that a step of a kernel may have; `how` is of all heads."""
  H = pallas.heads_of(state)
  whole = pallas.step(how, slow, xs, state, places.ids)
  widths = [x.shape[-1] for x in jax.tree.leaves((whole.x, whole.y))]
  return groups(H, widths)


def _light(heads: int, chunk: int, state: contract.State) -> bool:
  """More than 256 tokens or 1.3 MiB of weights only make a step's code long."""
  size = sum(math.prod(x.shape[2:]) for x in jax.tree.leaves(state.w))
  few = heads <= 16 and heads * chunk <= 256
  return few and heads * size * 4 <= 1.3 * 2**20


def groups(H: int, widths: Sequence[int]) -> list[int]:
  """Heads that a step can take: blocks are 128 lanes wide, or whole."""
  fits = lambda G: all(d == 1 or G * d % 128 == 0 for d in widths)
  return [G for G in range(1, H + 1) if H % G == 0 and (G == H or fits(G))]


def no_group(heads: int, H: int, may: Sequence[int]) -> str:
  """Why a step cannot take a number of heads, and which it can."""
  return (
    f"a step cannot take {heads} of {H} heads: they must divide them and fill "
    f"rows of 128 lanes; possible are {', '.join(map(str, may))}"
  )


def sizes(state: contract.State) -> tuple[int, int]:
  """(K, M) of a row of `tiles.json`: the first array of a head's weights."""
  return tuple(jax.tree.leaves(state.w)[0].shape[2:])


@functools.cache
def _tiles() -> Sequence[dict[str, Any]]:
  return json.loads(_TILES.read_text()) if _TILES.exists() else []


def _tile(
  chip: str, name: str, chunk: int, state: contract.State
) -> dict[str, Any]:
  """The row of `tiles.json` for a walk, or an empty one."""
  K, M = sizes(state)
  key = dict(chip=chip, name=name, C=chunk, K=K, M=M)
  fits = lambda row: all(row[k] == v for k, v in key.items())
  return next((row for row in _tiles() if fits(row)), {})
