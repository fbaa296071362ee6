"""Two chunk functions to walk with, and the first one token by token."""

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax.kernels import walk

_NEVER = -1e30


def _iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def linear(slow, state, x, at):
  """Linear attention with decay; each full chunk adds its momentum.

  D_t = a_t D_{t-1} + k_t^T v_t, y_t = q_t (R + D_t); where a chunk is full,
  s = s / 2 + its sum of writes and D = D + b s.
  """
  mm, q, k, v, la = at.tile.mm, *(x[n] for n in ("q", "k", "v", "la"))
  shape = (*q.shape[:-1], q.shape[-2])
  n = q.ndim - 2
  t, u = _iota(shape, n), _iota(shape, n + 1)
  row = lambda c: jnp.sum(jnp.where(t == u, c, 0.0), -2, keepdims=True)
  column = lambda r: jnp.sum(jnp.where(t == u, r, 0.0), -1, keepdims=True)
  end = lambda c: c[..., -1:, :]
  lam = jnp.sum(jnp.where(t >= u, row(la), 0.0), -1, keepdims=True)
  seen, goes_on = t >= u, jnp.ones_like(lam)
  if at.ids is not None:
    ids = column(at.ids)
    seen &= ids == at.ids
    goes_on = jnp.where(ids == 0, 1.0, 0.0).astype(lam.dtype)
    to_end = jnp.where(ids == end(ids), 1.0, 0.0).astype(lam.dtype)
  else:
    to_end = goes_on
  A = jnp.exp(jnp.where(seen, lam - row(lam), _NEVER))
  D, R = state.w["w"], slow["w"]
  y = goes_on * jnp.exp(lam) * mm(q, D) + mm(q, R)
  y = y + mm(A * mm(q, k, "nt"), v)
  write = mm(k, to_end * jnp.exp(end(lam) - lam) * v, "tn", "state")
  s = 0.5 * end(goes_on) * state.s["s"] + write
  w = end(goes_on) * jnp.exp(end(lam)) * D + write + at.closes * slow["b"] * s
  s = at.closes * s + (1 - at.closes) * state.s["s"] * end(goes_on)
  sums = [jnp.sum(z, -2, keepdims=True) for z in (at.real, la)]
  sums = jnp.concatenate(sums, -1)
  return walk.State({"w": w}, {"s": s}), y, sums


def linear_tokens(slow, state, x, places):
  """`linear` in numpy, a token at a time: (y, w, s, edge, sums).

  slow, state: numpy; x leaves [B,N,C,H,d].
  """
  B, N, C = places.real.shape
  R, b = slow["w"], slow["b"]
  D, s = state.w["w"].copy(), state.s["s"].copy()
  edge, y = D.copy(), np.zeros(x["q"].shape)
  sums = np.zeros((*D.shape[:2], 2))
  for row, n in np.ndindex(B, N):
    if places.resets[row, n]:
      D[row] = s[row] = edge[row] = 0
    if places.real[row, n].any():
      edge[row] = D[row]
    document, write = 0, np.zeros_like(D[row])
    for t in range(C):
      if places.ids is not None and places.ids[row, n, t] != document:
        document = places.ids[row, n, t]
        D[row] = s[row] = edge[row] = write[:] = 0
      if not places.real[row, n, t]:
        y[row, n, t] = np.nan
        continue
      q, k, v, la = (x[name][row, n, t] for name in ("q", "k", "v", "la"))
      a = np.exp(la)[..., None]
      one = k[:, :, None] * v[:, None]
      D[row], write = a * D[row] + one, a * write + one
      y[row, n, t] = np.einsum("hk,hkv->hv", q, R + D[row])
      sums[row] += np.stack([np.ones(len(la)), la[:, 0]], -1)
    if places.closes[row, n]:
      s[row] = 0.5 * s[row] + write
      D[row] += b * s[row]
      edge[row] = D[row]
  return y, D, s, edge, sums


def mlp(slow, state, x, at):
  """tanh(z w_in) w_out learns |M(k) - v|^2 / 2 at the last chunk edge.

  Reads before it learns, so that a chunk in two calls is the whole chunk.
  """
  mm = at.tile.mm
  edge = state.w if at.anchor is None else at.anchor
  w_in, w_out = (slow[n] + edge[n] for n in ("w_in", "w_out"))
  y = mm(jnp.tanh(mm(x["q"], w_in)), w_out)
  k = at.tile.rounded(x["k"])
  h = jnp.tanh(mm(k, w_in, "nn", "anchor"))
  error = mm(h, w_out, "nn", "anchor") - x["v"]
  d_out = at.real * jnp.exp(x["la"]) * error
  d_in = mm(d_out, w_out, "nt", "anchor") * (1 - h * h)
  w = {
    "w_in": state.w["w_in"] - mm(k, d_in, "tn", "state"),
    "w_out": state.w["w_out"] - mm(h, d_out, "tn", "state"),
  }
  size = jnp.sum(y, -1, keepdims=True)
  return walk.State(w, {}), {"y": y, "size": size}, None
