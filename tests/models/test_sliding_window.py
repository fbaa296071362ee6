"""Sliding-window attention against dense masked attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax.models.mixers.attention import (
  mixer as attention,
)
from nl_jax.models.mixers.attention import (
  sliding_window,
  softmax,
)


def draw(*shape, seed):
  return np.random.default_rng(seed).normal(size=shape)


def dense(q, k, v, document, window):
  tokens = q.shape[1]
  back = np.arange(tokens)[:, None] - np.arange(tokens)[None]
  mask = (back >= 0) & (back < window)
  mask = mask[None] & (document[:, :, None] == document[:, None])
  return softmax.attention(q, k, v, jnp.asarray(mask)[:, None])


@pytest.mark.parametrize("tokens", [1, 5, 12, 31])
@pytest.mark.parametrize("window", [2, 5, 12, 40])
def test_the_band_is_dense_attention_with_a_mask(tokens, window):
  document = np.sort(np.random.default_rng(3).integers(1, 4, (2, tokens)), 1)
  with jax.enable_x64(True):
    q = draw(2, tokens, 4, 6, seed=0)
    k, v = (draw(2, tokens, 2, 6, seed=i) for i in (1, 2))
    before = lambda x: np.pad(
      x, [(0, 0), (window - 1, 0)] + [(0, 0)] * (x.ndim - 2)
    )

    def band(q, k, v):
      return sliding_window.attend(q, k, v, document, before(document))

    made, back = jax.vjp(band, q, before(k), before(v))
    same, back_dense = jax.vjp(lambda *x: dense(*x, document, window), q, k, v)
    np.testing.assert_allclose(made, same, atol=1e-12)
    for grad, other in zip(back(made), back_dense(made)):
      np.testing.assert_allclose(grad[:, -tokens:], other, atol=1e-11)


@pytest.mark.parametrize("tokens,window", [(1, 5), (12, 5), (12, 12), (31, 5)])
def test_keys_that_all_see_stand_before_the_band(tokens, window):
  """Without a position of their own: dense attention with their columns."""
  document = np.sort(np.random.default_rng(3).integers(1, 4, (2, tokens)), 1)
  back = np.arange(tokens)[:, None] - np.arange(tokens)[None]
  mask = ((back >= 0) & (back < window))[None]
  mask = mask & (document[:, :, None] == document[:, None])
  mask = np.pad(mask, [(0, 0), (0, 0), (3, 0)], constant_values=True)
  always = tuple(draw(1, 3, 2, 6, seed=i) for i in (4, 5))
  q, k, v = (draw(2, tokens, h, 6, seed=i) for i, h in enumerate((4, 2, 2)))
  before = lambda x: np.pad(
    x, [(0, 0), (window - 1, 0)] + [(0, 0)] * (x.ndim - 2)
  )
  with jax.enable_x64(True):
    made = sliding_window.attend(
      q, before(k), before(v), document, before(document), always
    )
    k, v = (
      np.concatenate([np.tile(own, (2, 1, 1, 1)), x], 1)
      for own, x in zip(always, (k, v))
    )
    same = softmax.attention(q, k, v, jnp.asarray(mask)[:, None])
  np.testing.assert_allclose(made, same, atol=1e-12)


def test_memory_does_not_grow_with_the_square_of_the_text():
  """The largest array of a pass grows with T, not with T²."""

  def largest(tokens):
    shape = jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32)
    longer = jax.ShapeDtypeStruct((1, tokens + 31, 1, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    more = jax.ShapeDtypeStruct((1, tokens + 31), jnp.int32)
    made = jax.make_jaxpr(sliding_window.attend)(
      shape, longer, longer, ids, more
    )
    return max(var.aval.size for eqn in made.eqns for var in eqn.outvars)

  assert largest(4096) <= 4 * largest(1024) * 1.1


def test_a_window_that_is_none_is_refused():
  for window in (1, -3, 2.0):
    with pytest.raises(
      ValueError, match="window must be a whole number from 2"
    ):
      attention.Options(window=window)
