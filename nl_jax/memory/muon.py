"""Inner Muon (Atlas): a memory moves by its momentum, made orthogonal.

    S <- beta S - write u^T delta;   W <- alpha W + (1 - alpha) R + eta NS(S)

NS is five steps of Newton-Schulz (arXiv 2505.23735; model.md 2.3). "token"
moves at every token: the definition, one token at a time. "chunk" moves at the
end of each chunk, by the momentum and the eta of its last token; until then
weights only decay, and a token sees nothing of its own chunk.
"""

import jax
import jax.numpy as jnp

from nl_jax.kernels import orthogonalize as ns

MODES = ("off", "chunk", "token")
RATE = "muon_rate"  # Beside the momentum: eta of the last real token.
# Of LaCT: singular values of a Gaussian matrix end in 0.98 ... 1.03.
COEFFICIENTS = (
  (4.0848, -6.8946, 2.9270),
  (3.9505, -6.3029, 2.6377),
  (3.7418, -5.5913, 2.3037),
  (2.8769, -3.1427, 1.2046),
  (2.8366, -3.0525, 1.2012),
)


def orthogonal(S: jax.Array) -> jax.Array:
  """NS of [..., a, b]; 0 of 0."""
  return ns.orthogonalize(S, coeffs=COEFFICIENTS, ns_steps=len(COEFFICIENTS))


def start(w: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """The rate [B, H, 1, 1] before the first token.

  Args:
    w: the fast weights, dict of [B, H, a, b].
  """
  return {RATE: 0 * next(iter(w.values()))[..., :1, :1]}


def last_rate(before: jax.Array, eta: jax.Array, mask: jax.Array) -> jax.Array:
  """eta of the last real token of a block, [B, H, 1, 1].

  Args:
    before: that of the block before it, where this one has no real token.
    eta: [B, H, C].
    mask: bool [B, 1, C].
  """
  size = mask.shape[-1]
  last = size - 1 - mask[..., ::-1].argmax(axis=-1)
  found = jnp.take_along_axis(eta, last[..., None], axis=-1)
  there = mask.any(axis=-1)[..., None, None]
  return jnp.where(there, found[..., None], before)


def move(
  w: dict[str, jax.Array], s: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """The weights behind the end of a chunk.

  Args:
    w: dict of [B, H, a, b], decayed.
    s: their momentum, and the rate.
  """
  return {name: W + s[RATE] * orthogonal(s[name]) for name, W in w.items()}
