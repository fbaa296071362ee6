"""MLP memories: residual, with layer norm, gated (docs/mathematics.md 2.1).

    mlp      z + gelu(z w_in) w_out                        (paper eq. 89 = 91)
    mlp_ln   z + LN(gelu(z w_in) w_out), LN without affine (Miras)
    glu      z + (gelu(z w_in) * (z w_gate)) w_out         (Atlas++)

`residual=False` drops the leading z.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.memory import block as blocks
from nl_jax.memory import chunked
from nl_jax.memory import rule as rules
from nl_jax.memory.chunked import MemoryState as MemoryState
from nl_jax.memory.chunked import start as start

_gelu = jax.nn.gelu  # The tanh form; the paper does not state one.


def _layer_norm(x: jax.Array) -> jax.Array:
  centred = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + 1e-6)


class Architecture(NamedTuple):
  """A memory as its parts: finish(hidden(z W_1, ...) w_out).

  Attributes:
    inputs: names of the layers that are fed with z.
    hidden: from what these make of z to the hidden units.
    output: name of the layer that is fed with these; None: they are the end.
    finish: what follows it, or None.
  """

  inputs: tuple[str, ...]
  hidden: Callable[..., jax.Array]
  output: str | None = None
  finish: Callable[[jax.Array], jax.Array] | None = None

  def __call__(self, layer: rules.Layer, z: jax.Array) -> jax.Array:
    """z [..., K] -> [..., V], as `rule.Forward`."""
    y = self.hidden(*(layer(name, z) for name in self.inputs))
    y = y if self.output is None else layer(self.output, y)
    return y if self.finish is None else self.finish(y)


ARCHITECTURES = {
  "mlp": Architecture(("w_in",), _gelu, "w_out"),
  "mlp_ln": Architecture(("w_in",), _gelu, "w_out", _layer_norm),
  "glu": Architecture(
    ("w_in", "w_gate"), lambda x, gate: _gelu(x) * gate, "w_out"
  ),
}


def forward(arch: str, residual: bool = True) -> rules.Forward:
  """The architecture as a function of its layers, z [..., K] -> [..., V]."""
  if arch not in ARCHITECTURES:
    raise ValueError(
      "model.mixer.memory must be one of "
      f"{', '.join(ARCHITECTURES)}; got {arch!r}"
    )
  inner: Any = ARCHITECTURES[arch]
  return (lambda layer, z: z + inner(layer, z)) if residual else inner


def init(
  key: jax.Array,
  heads: int,
  key_dim: int,
  hidden: int,
  *,
  arch: str = "mlp",
  in_std: float = 1.0,
  out_std: float = 0.02,
) -> dict[str, jax.Array]:
  """The learned start.

  Args:
    key: random key.
    heads, key_dim, hidden: H, K (= V), M.
    arch: adds w_gate for "glu".
    in_std: 1 where keys and queries have unit norm (with K^-1/2 training
      diverged, docs/mathematics.md 9), else K^-1/2.
    out_std: of w_out.

  Returns:
    {"w_in": [H, K, M], "w_out": [H, M, K]} and w_gate like w_in, float32.
  """
  names = {"w_in": (key_dim, hidden), "w_out": (hidden, key_dim)}
  if arch == "glu":
    names["w_gate"] = (key_dim, hidden)
  keys = jax.random.split(key, len(names))
  std = lambda name: out_std if name == "w_out" else in_std
  return {
    name: std(name) * jax.random.normal(k, (heads, *shape), jnp.float32)
    for k, (name, shape) in zip(keys, names.items())
  }


def read(
  params: Mapping[str, jax.Array],
  state: MemoryState,
  z: jax.Array,
  *,
  arch: str = "mlp",
  residual: bool = True,
) -> jax.Array:
  """Reads z [B, T, H, K] from the weights as they are now; no write."""
  return blocks.read(forward(arch, residual), params, state.w, z)


def update(
  params: Mapping[str, jax.Array],
  state: MemoryState,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: rules.Gates,
  *,
  rule: rules.Rule,
  arch: str = "mlp",
  residual: bool = True,
  segment_ids: jax.Array | None = None,
  at_edge: bool = False,
  aligned: bool = False,
  run: chunked.Run | None = None,
) -> tuple[jax.Array, MemoryState, rules.Metrics]:
  """Writes and reads T tokens; arguments as `chunked.update`."""
  return chunked.update(
    forward(arch, residual), params, state, q, k, v, gates,
    rule=rule, segment_ids=segment_ids, at_edge=at_edge, aligned=aligned,
    run=run, name=arch,
  )  # fmt: skip
