"""The chunks of Mamba's recurrence against the token loop, and its kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax.kernels.selective_scan import selective_scan

B, T, I, N = 2, 13, 6, 3


def inputs(dtype=float):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  dt, A = jax.nn.softplus(draw(B, T, I)), -jnp.exp(draw(I, N))
  return dt, draw(B, T, I), draw(B, T, N), draw(B, T, N), A, draw(B, I, N)


def begins(packed=True):
  at = np.zeros((B, T), bool)
  at[0, 5] = at[0, 6] = at[0, 8] = at[1, 0] = at[1, 8] = at[1, 9] = True
  return jnp.asarray(at) if packed else None


def run(x, at, implementation, chunk):
  f = lambda *x: selective_scan(
    *x, at, chunk=chunk, implementation=implementation
  )
  y, back = jax.vjp(f, *x)
  return y, back(jax.tree.map(jnp.cos, y))


def close(made, same, tolerance):
  for x, y in zip(*map(jax.tree.leaves, (made, same))):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("chunk,packed", [(1, True), (4, True), (64, False)])
def test_a_chunk_at_once_is_the_token_loop(chunk, packed):
  with jax.enable_x64(True):
    x, at = inputs(), begins(packed)
    made, same = jax.jit(
      lambda: (run(x, at, "xla", chunk), run(x, at, "reference", chunk))
    )()
    close(made, same, 1e-12)


@pytest.mark.parametrize("packed", [True, False])
def test_a_kernel_is_the_token_loop(packed):
  """Documents that begin in chunks and with them, an end inside one."""
  x, at = inputs(jnp.float32), begins(packed)
  made, same = jax.jit(
    lambda: tuple(run(x, at, f, 8) for f in ("pallas_interpret", "reference"))
  )()
  close(made, same, 1e-5)


def test_channels_are_laid_as_heads():
  """Several heads of 128 channels, and a text that is its parts."""
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
  dt, A = jax.nn.softplus(draw(1, 9, 256)), -jnp.exp(draw(256, 2))
  x = dt, draw(1, 9, 256), draw(1, 9, 2), draw(1, 9, 2)
  state = draw(1, 256, 2)
  y, end = selective_scan(*x, A, state, implementation="reference")
  parts = []
  for first, last in ((0, 8), (8, 9)):
    part, state = selective_scan(
      *(z[:, first:last] for z in x), A, state, chunk=8,
      implementation="pallas_interpret",
    )  # fmt: skip
    parts.append(part)
  close((jnp.concatenate(parts, 1), state), (y, end), 1e-5)


def test_an_implementation_that_there_is_not_is_refused():
  with pytest.raises(ValueError, match="implementation of selective_scan must"):
    selective_scan(*inputs(), implementation="triton")
