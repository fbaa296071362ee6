"""The recurrence of Mamba as a chunk function.

Every number of a channel has a decay of its own, so there is nothing for a
matrix unit: a chunk is C steps of elementwise work on h. XLA, to which each
step would be launches and a trip of h through memory, runs them as an
associative scan, which forms every h_t; in a kernel h stays where it is, and
the steps are written one after the other. Groups of channels stand as heads,
h as [N, channels], so that channels fill the lanes.
"""

import jax
import jax.numpy as jnp

from nl_jax.kernels import walk as walks

_LANES = 128


def body(
  slow: jax.Array, state: walks.State, x: dict[str, jax.Array], at: walks.At
) -> tuple[walks.State, jax.Array, None]:
  """One chunk; see `kernels.walk`.

  Args:
    slow: A [..., N, d].
    state: w is h [..., N, d].
    x: dt, u [..., C, d]; B, C [..., C, N].
    at: the chunk's tokens.
  """
  run = _steps if at.tile.fused else _scan
  h, y = run(slow, state.w, x["dt"], x["dt"] * x["u"], x["B"], x["C"], at.ids)
  return walks.State(h, state.s), y, None


def _steps(
  A: jax.Array,
  h: jax.Array,
  dt: jax.Array,
  w: jax.Array,
  B: jax.Array,
  C: jax.Array,
  ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """The last h and y [..., C, d], token after token."""
  columns = lambda x: jnp.swapaxes(x, -1, -2)
  B, C, ys = columns(B), columns(C), []
  for t in range(dt.shape[-2]):
    now = slice(t, t + 1)
    decay = jnp.exp(dt[..., now, :] * A)
    if ids is not None and t:
      same = ids[..., now] == ids[..., t - 1 : t]
      decay = decay * jnp.where(same, 1.0, 0.0)
    h = decay * h + B[..., now] * w[..., now, :]
    ys.append(jnp.sum(h * C[..., now], axis=-2, keepdims=True))
  return h, jnp.concatenate(ys, axis=-2)


def _scan(
  A: jax.Array,
  h: jax.Array,
  dt: jax.Array,
  w: jax.Array,
  B: jax.Array,
  C: jax.Array,
  ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """`_steps`, all tokens at once."""
  decay = jnp.exp(dt[..., None, :] * A[..., None, :, :])
  if ids is not None:
    same = ids[..., 1:] == ids[..., :-1]
    same = jnp.concatenate([jnp.ones_like(same[..., :1]), same], axis=-1)
    decay = jnp.where(jnp.swapaxes(same, -1, -2)[..., None], decay, 0.0)
  merge = lambda x, y: (y[0] * x[0], y[0] * x[1] + y[1])
  write = w[..., None, :] * B[..., None]
  decay, written = jax.lax.associative_scan(
    merge, (decay, write), axis=decay.ndim - 3
  )
  hs = decay * h[..., None, :, :] + written
  return hs[..., -1, :, :], jnp.einsum("...cnd,...cn->...cd", hs, C)


def selective_scan(
  dt: jax.Array,
  u: jax.Array,
  B: jax.Array,
  C: jax.Array,
  A: jax.Array,
  state: jax.Array,
  begins: jax.Array | None,
  *,
  chunk: int,
  implementation: str | None,
  spec: jax.sharding.PartitionSpec | None,
) -> tuple[jax.Array, jax.Array]:
  """The chunks of a call; arguments and results as `api.selective_scan`."""
  (batch, tokens, I), N = dt.shape, B.shape[-1]
  d = _LANES if I % _LANES == 0 else I
  heads, size = I // d, 1 if tokens == 1 else chunk
  rest = [(0, 0), (0, -tokens % size)]
  places = walks.from_begins(tokens, size, begins, batch)

  def each(x: jax.Array) -> jax.Array:
    """[B,T,N] for every head, [B,T,H*N]."""
    x = jnp.broadcast_to(x[:, :, None], (batch, tokens, heads, N))
    return x.reshape(batch, tokens, heads * N)

  lay = lambda x: jnp.swapaxes(x.reshape(*x.shape[:-2], heads, d, N), -1, -2)
  xs = dict(dt=dt, u=u, B=each(B), C=each(C))
  y, after, _, _ = walks.walk(
    body, lay(A), jax.tree.map(lambda x: jnp.pad(x, [*rest, (0, 0)]), xs),
    places, state=walks.State(lay(state), ()), group=1, chunk_free=True,
    # A single token is not work for a kernel.
    implementation="xla" if tokens == 1 else implementation,
    spec=spec, name="selective_scan",
  )  # fmt: skip
  state = jnp.swapaxes(after.w, -1, -2).reshape(state.shape)
  return y[:, :tokens], state
