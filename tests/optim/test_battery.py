"""What every optimizer must do: one row each (docs/mathematics.md 10.9)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import ALL, COMPLEX, params

every = pytest.mark.parametrize("name", ALL)
_SMALL = ("m3", "delta_implicit", "deep", "adagrad_matrix")


def _types(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def _step(tx, grads, state, p):
  updates, state = tx.update(grads, state, p, an_unknown_extra=1)
  return optax.apply_updates(p, updates), state, updates


def _run(name, dtype, keys=("stack", "wide", "tall", "bias", "gain")):
  """Two compiled steps on every leaf; checks types and traces on the way."""
  tx, traces = ALL[name], []

  def step(g, s, p):
    traces.append(1)
    return _step(tx, g, s, p)

  jitted = jax.jit(step)
  draw = lambda seed: {k: params(dtype, seed)[k] for k in keys}
  p = draw(0)
  state = tx.init(p)
  before = _types(state)
  for t in range(2):
    p, state, updates = jitted(draw(t + 1), state, p)
  assert len(traces) == 1
  assert _types(state) == before
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(p))
  assert jax.tree.structure(updates) == jax.tree.structure(p)
  return p


@pytest.mark.versions
@every
def test_compiles_once_and_inside_partition_is_the_same(name):
  tx = ALL[name]
  p = _run(name, jnp.float32)
  labels = {k: "ours" for k in params()} | {"tall": "rest", "gain": "rest"}
  inside = optax.partition({"ours": tx, "rest": optax.sgd(0.1)}, labels)
  q = params()
  state = inside.init(q)
  update = jax.jit(inside.update)
  for t in range(2):
    updates, state = update(params(seed=t + 1), state, q)
    q = optax.apply_updates(q, updates)
  if "stagger" not in name:  # Its groups are other ones.
    for k in ("stack", "wide", "bias"):
      np.testing.assert_allclose(q[k], p[k], rtol=2e-4, atol=2e-5)
  np.testing.assert_allclose(updates["tall"], -0.1 * params(seed=2)["tall"])


@pytest.mark.parametrize("name", ["m3", "delta_implicit", "deep", "diag"])
def test_jit_equals_eager(name):
  tx, p = ALL[name], _run(name, jnp.float32)
  q, state = params(), tx.init(params())
  for t in range(2):
    q, state, _ = _step(tx, params(seed=t + 1), state, q)
  compare = lambda a, b: np.testing.assert_allclose(a, b, 2e-4, 2e-5)
  jax.tree.map(compare, p, q)


@every
def test_bfloat16_keeps_every_dtype(name):
  _run(name, jnp.bfloat16, ("stack", "bias"))


@pytest.mark.parametrize("name", _SMALL)
def test_float16_keeps_every_dtype(name):
  _run(name, jnp.float16, ("stack", "bias"))


@every
def test_a_differentiated_scan_is_finite_through_zero_gradients(name):
  tx = ALL[name]
  start = {k: x for k, x in params().items() if k in ("stack", "bias")}
  state = tx.init(start)

  def outer(p, scales):
    def step(carry, scale):
      p, state = carry
      g = jax.tree.map(lambda x: scale * x, p)
      updates, state = tx.update(g, state, p)
      p = optax.apply_updates(p, jax.tree.map(lambda u: 0.1 * u, updates))
      return (p, state), updates

    (p, _), updates = jax.lax.scan(step, (p, state), scales)
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(p)), updates

  both = jax.jit(jax.grad(outer, argnums=(0, 1), has_aux=True))
  slopes, updates = both(start, jnp.asarray([0.0, 0.0, 1.0, 0.5]))
  assert not any(x[:2].any() for x in jax.tree.leaves(updates))
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(slopes))
  assert all(x.any() for x in jax.tree.leaves(slopes[0]))


@every
def test_init_is_abstract_and_maps_over_params(name):
  tx = ALL[name]
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params()
  )
  state = tx.init(params())
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(jax.eval_shape(tx.init, abstract)) == shapes(state)
  assert shapes(tx.init(abstract)) == shapes(state)
  optax.tree.map_params(tx, lambda x: x, state)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_leaves(name):
  tx = ALL[name]
  p = params(jnp.complex64)
  state = tx.init(p)
  step = jax.jit(lambda g, s, p: _step(tx, g, s, p))
  for t in range(2):
    p, state, updates = step(params(jnp.complex64, t + 1), state, p)
  assert all(x.dtype == jnp.complex64 for x in jax.tree.leaves(updates))
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(p))
  assert any(jnp.abs(x.imag).max() > 0 for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", ["m3", "delta_implicit", "adagrad_matrix"])
def test_a_stack_is_its_layers(name):
  tx, run = ALL[name], {}
  for kind in ("stack", "layer"):
    p = params()["stack"]
    state = None
    q = {"w": p} if kind == "stack" else {"w": p[1]}
    state = tx.init(q)
    for t in range(3):
      g = params(seed=t + 1)["stack"]
      g = {"w": g} if kind == "stack" else {"w": g[1]}
      q, state, _ = _step(tx, g, state, q)
    run[kind] = q["w"]
  np.testing.assert_allclose(run["stack"][1], run["layer"], atol=1e-5)
