"""Products of a chunk function and their derivatives, by policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from nl_jax.kernels.walk import pallas, products

EXACT = products.Tile()
# Of one pass to three, the largest error relative to the largest value.
BOUNDS = {"x1": 1e-2, "x2": 5e-3, "x3": 5e-5}


def draw(n, *shape):
  return jax.random.normal(jax.random.key(n), shape)


def size(x, y):
  return float(jnp.abs(x - y).max() / jnp.abs(y).max())


@pytest.mark.parametrize("how", BOUNDS)
@pytest.mark.parametrize("form", ["nn", "nt", "tn"])
@pytest.mark.parametrize("fused", [False, True])
def test_derivatives_are_as_precise_as_their_product(form, how, fused):
  x, y, c = draw(0, 3, 16, 16), draw(1, 3, 16, 16), draw(2, 3, 16, 16)
  policy = dataclasses.replace(products.LEAN, read=how)

  def curved(tile):
    def bend(x, y):
      return jnp.sum(c * jnp.sin(tile.mm(x, y, form)))

    slope = lambda x: jnp.sum(jax.grad(bend)(x, y) ** 2)
    return jax.grad(bend, (0, 1))(x, y), jax.grad(slope)(x)

  (dx, dy), twice = curved(products.Tile(policy, fused=fused))
  (ex, ey), exact = curved(EXACT)
  bound = BOUNDS[how]
  assert max(size(dx, ex), size(dy, ey)) < 4 * bound
  assert size(twice, exact) < 20 * bound


def in_a_kernel(run, *args):
  """run(*args), a tuple of arrays like them, inside an interpreted kernel."""

  def kernel(*refs):
    ins, outs = refs[: len(args)], refs[len(args) :]
    for out, made in zip(outs, run(*(ref[...] for ref in ins))):
      out[...] = made

  like = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args)
  return pl.pallas_call(kernel, out_shape=like, interpret=True)(*args)


@pytest.mark.parametrize("policy", ["lean", "lean2"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_system_and_its_derivative(policy, fused):
  L = [jnp.tril(0.2 * draw(3 + n, 2, 16, 16), -1) for n in range(2)]
  rows = [draw(6 + n, 2, 16, 5) for n in range(2)]

  def solve(tile, a, b, x, y):
    return jnp.stack(tile.solve([(a, x), (b, y)], 16))

  def slopes(tile):
    of = lambda *args: jnp.sum(jnp.sin(solve(tile, *args)))
    return jax.grad(of, (0, 1, 2, 3))

  tile = products.Tile(products.POLICIES[policy], fused=fused)
  run = in_a_kernel if fused else lambda f, *args: f(*args)
  made = run(slopes(tile), *L, *rows)
  exact = slopes(EXACT)(*L, *rows)
  for x, y in zip(made[:2], exact[:2]):
    assert size(jnp.tril(x, -1), jnp.tril(y, -1)) < BOUNDS["x1"]
  for x, y in zip(made[2:], exact[2:]):
    assert size(x, y) < 1e-3


def test_systems_in_a_kernel_fill_whole_registers():
  """Packed to 128 rows the smallest blocks are solved beside each other."""
  L = jnp.tril(0.3 * draw(3, 2, 64, 64), -1)
  packed = jax.scipy.linalg.block_diag(*L)[None]
  rows = draw(4, 1, 128, 8)
  tile = products.Tile(fused=True)

  solve = lambda L, x: (L, *tile.solve([(L, x)], 64))
  _, made = in_a_kernel(solve, packed, rows)
  np.testing.assert_allclose(made + packed @ made, rows, atol=2e-5)


def test_rounded_keys_erase_as_much():
  k, rate = draw(5, 2, 3, 16, 64), jnp.full((2, 3, 16, 1), 2.0)
  k = (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).at[0, 0, 0].set(0.0)
  erased = lambda u, rate: rate * jnp.sum(u * u, axis=-1, keepdims=True)
  off = {}
  for name, policy in products.POLICIES.items():
    tile = products.Tile(policy)
    u, given = tile.keys(k, rate)
    off[name] = float(jnp.abs(erased(u, given) - erased(k, rate)).max())
    assert given[0, 0, 0, 0] == 2.0
    # Nothing of a gradient goes through the change of the rate.
    slope = jax.grad(lambda k, tile=tile: tile.keys(k, rate)[1].sum())
    np.testing.assert_array_equal(slope(k), 0.0)
  assert off["f32"] == 0 and off["lean2"] < 1e-6 < 1e-4 < off["lean"]


def test_states_are_kept_as_exactly_as_they_are_read():
  state = jax.ShapeDtypeStruct((64, 128), jnp.float32)
  kept = {
    name: pallas.saved_dtype(policy, state)
    for name, policy in products.POLICIES.items()
  }
  assert kept == dict(f32=jnp.float32, lean=jnp.bfloat16, lean2=jnp.float32)


@pytest.mark.parametrize("form", ["nn", "nt", "tn"])
def test_a_product_of_xla_is_linear_in_both(form):
  """Forward mode, a batch of one operand, and the curvature of both."""
  x, y, dx = draw(6, 2, 16, 8), draw(7, 2, 16, 8), draw(8, 2, 16, 8)
  if form == "nn":
    y = jnp.swapaxes(y, -1, -2)
  spec = {"nn": "bij,bjk->bik", "nt": "bij,bkj->bik", "tn": "bji,bjk->bik"}
  mm = lambda x: EXACT.mm(x, y, form)
  like = lambda x: jnp.einsum(spec[form], x, y)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
  for a, b in zip(jax.jvp(mm, (x,), (dx,)), jax.jvp(like, (x,), (dx,))):
    close(a, b)
  many = jnp.stack([x, dx])
  close(jax.jit(jax.vmap(mm))(many), jax.vmap(like)(many))
  of = lambda mm: (
    lambda v: jax.jvp(jax.grad(lambda x: jnp.sum(jnp.sin(mm(x)))), (x,), (v,))[
      1
    ]
  )
  close(of(mm)(dx), of(like)(dx))
