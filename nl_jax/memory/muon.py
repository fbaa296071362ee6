"""Inner Muon (Atlas): a memory moves by its momentum, made orthogonal.

    S <- beta S - write u^T delta;   W <- alpha W + (1 - alpha) R + eta NS(S)

NS is five steps of Newton-Schulz (arXiv 2505.23735; docs/mathematics.md 2.3).
"token" moves at every token: the definition, one token at a time. "chunk" moves
at the end of each chunk, by the momentum and the eta of its last token; until
then weights only decay, and a token sees nothing of its own chunk.
"""

import jax
import jax.numpy as jnp

from nl_jax.kernels import orthogonalize as ns
from nl_jax.kernels import rank_one, walk
from nl_jax.kernels.rank_one import segments
from nl_jax.memory import block as blocks

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


def momentum(
  u: jax.Array,
  delta: jax.Array,
  rates: rank_one.Rates,
  S: jax.Array,
  window: tuple[jax.Array, jax.Array, jax.Array] | None,
  at: walk.At,
) -> jax.Array:
  """S after a chunk: a memory that decays by beta, and erases nothing.

  Args:
    u, delta, rates, window: of the chunk, see `kernels.rank_one`.
    S: [..., a, b] before it.
    at: the chunk's tokens.
  """
  assert rates.log_beta is not None  # Inner Muon has momentum.
  tokens = rank_one.Tokens(
    rates.log_beta, None, at.real, ids=at.ids, tile=at.tile
  )
  chunk = rank_one.Chunk(tokens, u, delta, rates.write, None, S, window=window)
  return chunk.end(None)[0]


def move(block: blocks.Block, eta: jax.Array) -> blocks.Block:
  """A block after a chunk, and after its move where the chunk closes.

  Args:
    block: decayed weights, new momentum, the rate from before the chunk.
    eta: [..., C, 1].
  """
  at = block.at
  size = at.real.shape[-2]
  t = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
  s = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
  later = (s > t).reshape((1,) * (eta.ndim - 2) + (size, size))
  rest = jnp.where(later, at.tile.row(at.real), 0.0)
  rest = jnp.sum(rest, axis=-1, keepdims=True)
  last = at.real * jnp.where(rest == 0, 1.0, 0.0)
  there = jnp.sum(at.real, axis=-2, keepdims=True) > 0
  rate = jnp.sum(last * eta, axis=-2, keepdims=True)
  rate = jnp.where(there, rate, block.carried[RATE])

  def moved(w: dict[str, jax.Array]) -> dict[str, jax.Array]:
    step = lambda name: rate * orthogonal(block.s[name])
    return {
      name: W + jnp.where(at.closes > 0, step(name), 0.0)
      for name, W in w.items()
    }

  if at.tile.fused:
    w = moved(dict(block.w))
  else:  # While no chunk ends, as while single tokens are read, no NS is made.
    w = jax.lax.cond((at.closes > 0).any(), moved, lambda w: w, dict(block.w))
  return block._replace(w=w, carried={**block.carried, RATE: rate})


def by_token(
  U: jax.Array,
  Delta: jax.Array,
  Q: jax.Array | None,
  rates: rank_one.Rates,
  W: jax.Array,
  S: jax.Array,
  R: jax.Array | None,
  *,
  eta: jax.Array,
  read: str,
  anchor: jax.Array,
  start: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
  """W moves at every token: `rank_one`'s loop with eta NS(S) for S.

  Args:
    U, Delta, Q, rates, W, S, R, read, anchor, start, segment_ids: of
      `kernels.rank_one.rank_one`; nothing is erased.
    eta: [..., C, 1], the rate of the move.

  Returns:
    (reads [..., C, b] or None, W, S).
  """
  axis = U.ndim - 2
  R = jnp.zeros_like(W) if R is None else R
  begins = jnp.zeros(rates.mask.shape[:-1], bool)
  if segment_ids is not None:
    first = segment_ids[..., :1] * 0
    index = segments.running_index(segment_ids, first[..., 0])
    begins = jnp.diff(index, axis=-1, prepend=first) > 0
  log_alpha, log_beta, write, _, mask = rates
  xs = (U, Delta, Q, log_alpha, log_beta, write, eta, mask, begins)
  xs = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), xs)

  def token(carry, x):
    W, S, anchor = carry
    u, delta, q, log_alpha, log_beta, write, eta, real, begins = x
    begins, real = begins[..., None, None], real[..., None] != 0
    W = jnp.where(begins, start, W)
    S = jnp.where(begins, 0.0, S)
    anchor = jnp.where(begins, start, anchor)
    matrix = lambda rate: rate[..., None]
    step = matrix(write) * u[..., :, None] * delta[..., None, :]
    S_new = matrix(jnp.exp(log_beta)) * S - step
    alpha = matrix(jnp.exp(log_alpha))
    W_new = alpha * W + (1.0 - alpha) * R + matrix(eta) * orthogonal(S_new)
    W_new, S_new = jnp.where(real, W_new, W), jnp.where(real, S_new, S)
    y = None
    if q is not None:
      seen = {"after": W_new, "before": W, "chunk_start": anchor}[read]
      y = jnp.einsum("...a,...ab->...b", q, seen)
    return (W_new, S_new, anchor), y

  lead = jnp.broadcast_shapes(W.shape[:-2], U.shape[:-2])
  whole = lambda x: jnp.broadcast_to(x, (*lead, *W.shape[-2:]))
  carry = jax.tree.map(whole, (W, S, anchor))
  (W, S, _), reads = jax.lax.scan(token, carry, xs)
  return None if Q is None else jnp.moveaxis(reads, 0, axis), W, S
