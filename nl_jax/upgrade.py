"""Memory files of earlier versions, made into those of this one.

In format 1 a memory kept its weights, not how far they are from its learned
start; `s` held what is now `carried` beside the momentum; generators of
self-modifying Titans were stacked by role; and memories whose chunk is not part
of the function kept their place in it.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from nl_jax import types
from nl_jax.memory import self_modifying

Leaves = dict[str, jax.Array]

_MEMORY = re.compile(
  r"layers/(slow/|begin/|now/)?(.+?)/(anchor|w|s|phase)(?:/(w(?:_\w+)?))?"
)
_GENERATORS = "memory/generators"


def memory(leaves: Leaves, model: Any, params: types.Params) -> Leaves:
  """The leaves of format 2 that say what those of format 1 say.

  Args:
    leaves: by name.
    model: a `LanguageModel` that they fit.
    params: its weights.
  """
  starts, made = _starts(model, params), {}
  for name, x in leaves.items():
    name = name.replace("segment/s/", "segment/carried/")
    made[re.sub(r"/s/(past_\w+|muon_rate)$", r"/carried/\1", name)] = x
  for name, x in made.items():
    found = _MEMORY.fullmatch(name)
    if not found:
      continue
    part, place, slot, layer = found.groups()
    if place == _GENERATORS and layer:
      x = _side_by_side(x, layer, model)
    if place in starts and slot in ("anchor", "w"):
      x = _deviation(x, starts[place][layer], part)
    # Memories that start empty are those whose chunk is not part of them.
    if place not in starts and slot == "phase":
      x = jnp.zeros_like(x)
    if place not in starts and slot == "anchor":
      x = jnp.copy(made[name.replace("/anchor/", "/w/")])
    made[name] = x
  return made


def _starts(model: Any, params: types.Params) -> dict[str, types.Params]:
  """The learned starts by the place of a memory, leaves [layers,H,a,b]."""
  made = {}
  own = getattr(model.module, "starts", None)
  if own:
    mixers = params["blocks"]["mixer"]
    made = jax.vmap(lambda p: own(p, model))(mixers)
  if getattr(model, "local", False):
    for level, kernels in model.theta(params).items():
      one_head = {name: w[:, None] for name, w in kernels.items()}
      made[f"fast/{level}"] = one_head
  return made


def _side_by_side(
  x_LxBxHxRxaxb: jax.Array, layer: str, model: Any
) -> jax.Array:
  """One layer of all generators, from its stack by role."""
  config = model.mixer
  by_role = {
    role: {layer: x_LxBxHxRxaxb[:, :, :, i]}
    for i, role in enumerate(config.generator_roles)
  }
  return self_modifying.lay(by_role, config)[layer]


def _deviation(
  x_LxBxHxaxb: jax.Array, start: jax.Array, part: str | None
) -> jax.Array:
  """How far weights are from the start; in context, of some of the layers."""
  count = x_LxBxHxaxb.shape[0]
  own = start[:count] if part == "slow/" else start[start.shape[0] - count :]
  return x_LxBxHxaxb - own.astype(x_LxBxHxaxb.dtype)[:, None]
