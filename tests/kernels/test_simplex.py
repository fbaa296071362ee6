"""The chunk form with lags against the token loop, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax.kernels.rank_one import Rates
from nl_jax.kernels.simplex import simplex

B, H, C, a, b = 2, 2, 6, 3, 4
IDS = ((1, 1, 0, 2, 2, 3), (1, 1, 1, 1, 0, 0))


def inputs(along):
  """(U, Delta, Q, A, anchor, start), Rates and ids; gates [..., C, *along]."""
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s))
  logs = lambda n: jax.nn.log_softmax(draw(n, H, a, b), axis=-2)
  ids = jnp.broadcast_to(jnp.asarray(IDS)[:, None], (B, H, C))
  x = draw(B, H, C, a), draw(B, H, C, b), draw(B, H, C, a)
  x = (*x, logs(B), logs(B), logs(1))
  rates = Rates(
    jax.nn.log_sigmoid(draw(B, H, C, *along)), None,
    jax.nn.sigmoid(draw(B, H, C, *along)), None, (ids > 0)[..., None],
  )  # fmt: skip
  return x, rates, ids


@pytest.mark.parametrize("read,along", [
  ("after", (a, 1)), ("before", (1, b)), ("chunk_start", (1,)),
])  # fmt: skip
def test_a_chunk_at_once_is_the_token_loop(read, along):
  """With documents that begin inside it, padding and gates of a channel."""
  with jax.enable_x64(True):
    x, rates, ids = inputs(along)
    lag = jnp.asarray([True, False])[:, None, None, None]

    def run(implementation):
      def f(U, Delta, Q, A, anchor, start, log_alpha, write):
        own = rates._replace(log_alpha=log_alpha, write=write)
        y, A = simplex(
          U, Delta, Q, own, A, lag=lag, read=read, anchor=anchor, start=start,
          segment_ids=ids, implementation=implementation,
        )  # fmt: skip
        return jnp.where(own.mask, y, 0.0), A

      y, back = jax.vjp(f, *x, rates.log_alpha, rates.write)
      return y, back(jax.tree.map(jnp.cos, y))

    made, same = jax.jit(lambda: (run(None), run("reference")))()
    for mine, other in zip(*map(jax.tree.leaves, (made, same))):
      np.testing.assert_allclose(mine, other, atol=1e-12)


def test_without_lag_each_state_sums_to_one():
  """At each token softmax(alpha log W - write u^T delta)."""
  with jax.enable_x64(True):
    (U, Delta, Q, A, *_), rates, _ = inputs((a, 1))
    rates = rates._replace(mask=jnp.ones((B, H, C, 1)))
    y, end = simplex(U, Delta, Q, rates, A, read="after")
    W, reads = np.exp(A), []
    for t in range(C):
      keep, rate = np.exp(rates.log_alpha[:, :, t]), rates.write[:, :, t]
      step = U[:, :, t, :, None] * Delta[:, :, t, None]
      W = np.exp(keep * np.log(W) - rate * step)
      W = W / W.sum(-2, keepdims=True)
      reads.append(np.einsum("bhi,bhij->bhj", Q[:, :, t], W))
    np.testing.assert_allclose(y, np.stack(reads, 2), atol=1e-12)
    np.testing.assert_allclose(np.exp(end), W, atol=1e-12)


@pytest.mark.parametrize("change,message", [
  (dict(implementation="xla"), "simplex without lag runs only"),
  (dict(implementation="pallas"), "implementation of simplex must be"),
  (dict(read="never"), "read must be one of"),
  (dict(segment_ids=0), "segment_ids needs start"),
])  # fmt: skip
def test_switches_that_cannot_be_are_refused(change, message):
  (U, Delta, Q, A, *_), rates, ids = inputs((1,))
  if "segment_ids" in change:
    change = dict(segment_ids=ids)
  with pytest.raises(ValueError, match=message):
    simplex(U, Delta, Q, rates, A, **dict(read="after") | change)


def test_rates_that_there_are_not_are_refused():
  (U, Delta, Q, A, *_), rates, _ = inputs((1,))
  with pytest.raises(ValueError, match="without momentum and without an eras"):
    simplex(U, Delta, Q, rates._replace(erase="write"), A, read="after")
