"""The chunk form against the token loop: values, states and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax.kernels import general_delta_rule as ops
from nl_jax.kernels.rank_one import Rates, rank_one

B, T, H, K, V = 2, 13, 2, 4, 3


def draw(*shape, seed):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def inputs(decay=0.6):
  q, k, w, a, b = (draw(B, T, H, K, seed=i) for i in range(5))
  a = a / jnp.linalg.norm(a, axis=-1, keepdims=True)
  w, b = -decay * jax.nn.sigmoid(w), a * jax.nn.sigmoid(b)
  state = draw(B, H, K, V, seed=6)
  return q, k, draw(B, T, H, V, seed=5), w, (a, b), state


def begins(packed):
  at = np.zeros((B, T), bool)
  at[0, 5], at[0, 6], at[1, 8] = True, True, True
  return jnp.asarray(at) if packed else None


def close(x, y, tolerance=1e-10):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("chunk,packed", [
  (1, True), (4, False), (4, True), (64, True),
])  # fmt: skip
def test_the_chunk_form_is_the_token_loop(chunk, packed):
  with jax.enable_x64(True):
    x, at = inputs(), begins(packed)

    def run(implementation):
      f = lambda *x: ops.general_delta_rule(
        *x, at, chunk=chunk, implementation=implementation
      )
      y, back = jax.vjp(f, *x)
      return y, back(y)

    made, same = jax.jit(lambda: (run("xla"), run("reference")))()
    for mine, other in zip(jax.tree.leaves(made), jax.tree.leaves(same)):
      close(mine, other)


def test_a_text_is_its_parts():
  with jax.enable_x64(True):
    *x, state = inputs()
    y, end = ops.general_delta_rule(*x, state, chunk=4)
    parts = []
    for first, last in ((0, 3), (3, 4), (4, T)):
      cut = jax.tree.map(lambda z, i=first, j=last: z[:, i:j], x)
      part, state = ops.general_delta_rule(*cut, state, chunk=4)
      parts.append(part)
    close(np.concatenate(parts, 1), y)
    close(state, end)


def test_with_a_decay_a_head_it_is_the_rank_one_rule():
  """`dot`, rho = eta, erase before the decay (docs/mathematics.md 2.5)."""
  with jax.enable_x64(True):
    q, k, v, w, (a, _), state = inputs()
    w, rate = w[..., :1], jax.nn.sigmoid(draw(B, T, H, 1, seed=7))
    log = jnp.broadcast_to(w, a.shape)
    y, end = ops.general_delta_rule(
      q, rate * a, v, log, (a, rate * a), state, chunk=4
    )
    head = lambda x: jnp.swapaxes(x, 1, 2)
    rates = Rates(
      head(w), None, head(rate), head(rate), jnp.ones((B, H, T, 1), bool)
    )
    same, S, _ = rank_one(
      head(a), -head(v), head(q), rates, state, None, None,
      read="after", erase_of="whole",
    )  # fmt: skip
    close(y, head(same))
    close(end, S)


def test_the_longest_chunk_keeps_float32():
  """RWKV-7's fastest decay at each of 64 tokens, against float64."""
  rng = np.random.default_rng(0)
  q, k, a = rng.standard_normal((3, 1, 128, 1, 8))
  a = a / np.linalg.norm(a, axis=-1, keepdims=True)
  v, w = rng.standard_normal((1, 128, 1, 5)), np.full_like(q, -0.6065)
  x = (q, k, v, w, (a, 0.9 * a), np.zeros((1, 1, 8, 5)))
  with jax.enable_x64(True):
    same, _ = ops.general_delta_rule(*x, implementation="reference")
  single = jax.tree.map(lambda z: jnp.asarray(z, jnp.float32), x)
  y, _ = ops.general_delta_rule(*single, chunk=64)
  close(y, np.asarray(same), 1e-5)


def test_a_kernel_is_the_token_loop():
  """Documents that begin in chunks and with them, an end inside one."""
  x = jax.tree.map(lambda z: jnp.asarray(z, jnp.float32), inputs())
  at = begins(True).at[0, 8].set(True)

  def run(implementation):
    f = lambda *x: ops.general_delta_rule(
      *x, at, chunk=8, implementation=implementation
    )
    y, back = jax.vjp(f, *x)
    return y, back(y)

  made, other, same = jax.jit(
    lambda: tuple(map(run, ("pallas_interpret", "xla", "reference")))
  )()
  for i, tolerance in ((0, 1e-5), (1, 1e-4)):
    for y in (made, other):
      for mine, right in zip(*map(jax.tree.leaves, (y[i], same[i]))):
        close(mine, np.asarray(right), tolerance)


def test_a_single_token_needs_no_kernel():
  x = jax.tree.map(lambda z: jnp.asarray(z, jnp.float32), inputs())
  *x, state = jax.tree.map(lambda z: z[:, :1], x[:-1]) + (x[-1],)
  made = ops.general_delta_rule(*x, state, implementation="pallas_interpret")
  same = ops.general_delta_rule(*x, state, implementation="reference")
  for mine, right in zip(made, same):
    close(mine, right, 1e-6)


def test_an_implementation_that_there_is_not_is_refused():
  with pytest.raises(ValueError, match="implementation of general_delta_rule"):
    ops.general_delta_rule(*inputs(), implementation="triton")
