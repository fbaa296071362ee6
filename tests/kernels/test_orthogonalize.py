"""Newton-Schulz: scalar map, symmetries, errors (identities 1-2)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Dims
from optax.contrib import _muon

from nl_jax.kernels import orthogonalize as ops

_TABLE = [
  ("jordan", 5, (0.4705, 0.6989, 0.7121, 0.7654, 0.6964)),
  ("polar_express", 5, (0.8466, 0.9968, 1.0165, 1.0864, 0.9035)),
  ("cubic", 3, (0.0034, 0.0337, 0.3284, 0.9753, 1.0)),
  ("cubic", 5, (0.0076, 0.0758, 0.6587, 1.0, 1.0)),
  ("cubic", 15, (0.4165, 1.0, 1.0, 1.0, 1.0)),
  ("eq44", 5, (0.0051, 0.0510, 0.4596, 0.8846, 1.0)),
  ("eq44", 20, (0.1690, 0.6903, 0.7526, 0.8846, 1.0)),
  ("eq44", 60, (0.7076, 0.7121, 0.7526, 0.8846, 1.0)),
]
_COEFFS = ("jordan", "polar_express", "cubic", "eq44")


def _normal(*shape, dtype=jnp.float64, seed=0):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def _ortho(x, **kw):
  return ops.orthogonalize(x, **kw)


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize(("coeffs", "steps", "expected"), _TABLE)
def test_scalar_map(coeffs, steps, expected):
  values = (0.001, 0.01, 0.1, 0.5, 1.0)
  rows = [np.diag([s, np.sqrt(1 - s * s)]) for s in values]
  got = _ortho(jnp.asarray(np.stack(rows)), coeffs=coeffs, ns_steps=steps)
  np.testing.assert_allclose(got[:, 0, 0], expected, atol=5.1e-5)


@pytest.mark.parametrize("coeffs", _COEFFS)
def test_acts_on_singular_values_alone(coeffs):
  x = _normal(5, 3)
  U, s, Vt = np.linalg.svd(x, full_matrices=False)
  f = np.diagonal(_ortho(jnp.diag(s), coeffs=coeffs))
  np.testing.assert_allclose(_ortho(x, coeffs=coeffs), U * f @ Vt, atol=1e-11)


@pytest.mark.parametrize("coeffs", _COEFFS)
def test_symmetries(coeffs):
  x = _normal(4, 6)
  y = _ortho(x, coeffs=coeffs)
  Q = jnp.linalg.qr(_normal(4, 4, seed=1))[0]
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11)
  close(_ortho(x.T, coeffs=coeffs), y.T)
  close(_ortho(Q @ x, coeffs=coeffs), Q @ y)
  for k in (1e-3, 1e3):
    close(_ortho(k * x, coeffs=coeffs), y)


def test_a_stack_is_a_loop():
  x = _normal(2, 3, 6, 4)
  want = jnp.stack([jnp.stack([_ortho(m) for m in row]) for row in x])
  np.testing.assert_allclose(_ortho(x), want, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_equals_optax(dtype, shape):
  x = _normal(*shape, dtype=dtype)
  want = _muon.orthogonalize_via_newton_schulz(
    x, jnp.asarray(_muon._DEFAULT_NS_COEFFS), eps=1e-8
  )
  np.testing.assert_allclose(_ortho(x, eps=1e-8), want, atol=2e-6)


def test_eq44_tends_to_the_root_of_its_stationarity():
  s = np.asarray([0.05, 0.3, 0.6, 0.7])
  s /= np.linalg.norm(s)
  got = np.diagonal(_ortho(jnp.diag(s), coeffs="eq44", ns_steps=400))
  want = [np.roots([2, 0, -1, -v]).real.max() for v in s]
  np.testing.assert_allclose(got, want, atol=2e-11)


@pytest.mark.parametrize("coeffs", _COEFFS)
def test_zero_gives_zero_with_a_finite_derivative(coeffs):
  x = jnp.zeros((2, 3, 4)).at[1].set(_normal(3, 4))
  y, pull = jax.vjp(lambda x: _ortho(x, coeffs=coeffs), x)
  assert not y[0].any() and y[1].any()
  assert jnp.isfinite(pull(jnp.ones_like(y))[0]).all()


def test_derivative_is_that_of_the_map():
  x, v = _normal(3, 4), _normal(3, 4, seed=1)
  _, slope = jax.jvp(_ortho, (x,), (v,))
  h = 1e-6
  want = (_ortho(x + h * v) - _ortho(x - h * v)) / (2 * h)
  np.testing.assert_allclose(slope, want, atol=1e-6)


def test_no_steps_return_the_input():
  x = _normal(3, 4)
  np.testing.assert_array_equal(_ortho(x, ns_steps=0), x)


def test_tables_repeat_their_last_row_and_are_cut():
  x = _normal(3, 4)
  rows = ops.NS_COEFFS["polar_express"]
  factor = {"coeffs": [(1.0, 0.0, 0.0), *rows]}
  assert _ortho(x, ns_steps=6, **factor).shape == x.shape
  twice = _ortho(x, coeffs=[(3.0, -3.0, 1.0)], ns_steps=2)
  np.testing.assert_allclose(
    twice, _ortho(x, coeffs=[(3.0, -3.0, 1.0)] * 2, ns_steps=2), atol=0
  )
  first = _ortho(x, coeffs=[(3.0, -3.0, 1.0), (9.0, 0.0, 0.0)], ns_steps=1)
  np.testing.assert_allclose(
    first, _ortho(x, coeffs=[(3.0, -3.0, 1.0)], ns_steps=1), atol=0
  )


@pytest.mark.parametrize(
  ("shape", "dims"),
  [
    ((2, 3, 4), Dims(0, 2)),
    ((2, 3, 4), Dims(-3, -1)),
    ((2, 3, 4, 5), Dims(2, (0, 3))),
    ((4, 2, 3), Dims((1, 2), 0)),
  ],
)
def test_dimension_numbers_as_in_optax(shape, dims):
  x = _normal(*shape)
  want = _muon.orthogonalize_via_newton_schulz(
    x,
    jnp.asarray(_muon._DEFAULT_NS_COEFFS),
    eps=1e-12,
    dimension_numbers=dims,
  )
  np.testing.assert_allclose(_ortho(x, dims=dims), want, atol=1e-6)


def test_iteration_dtype_and_output_dtype():
  x = _normal(8, 16, dtype=jnp.float32)
  rounded = x.astype(jnp.float16)
  half = _ortho(rounded)
  assert half.dtype == jnp.float16
  want = _ortho(rounded.astype(jnp.float32))
  np.testing.assert_allclose(half, want, atol=1e-3)
  low = _ortho(x, ns_dtype=jnp.bfloat16)
  assert low.dtype == jnp.float32
  np.testing.assert_allclose(low, _ortho(x), atol=0.1)


def test_tree_groups_equal_shapes_and_passes_none_through():
  tree = {
    "a": _normal(4, 6),
    "b": {"w": _normal(6, 4, seed=1), "stack": _normal(3, 4, 6, seed=2)},
    "c": _normal(5, seed=3),
    "d": _normal(3, 3, seed=4),
  }
  dims = {"a": Dims(-2, -1), "b": Dims(-2, -1), "c": None, "d": None}
  got = ops.orthogonalize_tree(tree, dims)
  for path in (("a",), ("b", "w"), ("b", "stack")):
    x, y = tree, got
    for key in path:
      x, y = x[key], y[key]
    np.testing.assert_allclose(y, _ortho(x), atol=1e-12)
  assert got["c"] is tree["c"] and got["d"] is tree["d"]
  text = jax.jit(lambda t: ops.orthogonalize_tree(t, dims)).lower(tree)
  assert text.as_text().count("stablehlo.while") == 1


def test_masked_leaves_stay_masked():
  tree = {"a": optax.MaskedNode(), "b": _normal(3, 4)}
  dims = {"a": Dims(-2, -1), "b": Dims(-2, -1)}
  got = ops.orthogonalize_tree(tree, dims)
  assert got["a"] == optax.MaskedNode()


@pytest.mark.parametrize(
  ("kw", "error", "match"),
  [
    ({"coeffs": "jordam"}, ValueError, "coeffs must be one of"),
    ({"coeffs": (1.0, 2.0, 3.0)}, ValueError, r"\(k, 3\)"),
    ({"ns_steps": -1}, ValueError, "ns_steps must be >= 0"),
    ({"ns_steps": 2.0}, TypeError, "must be an int, got 2.0"),
    ({"dims": Dims(0, 0)}, ValueError, "overlap"),
    ({"dims": Dims(0, 5)}, ValueError, "out of range"),
    ({"dims": {"w": Dims(0, 1)}}, ValueError, "prefix tree"),
  ],
)
def test_errors(kw, error, match):
  with pytest.raises(error, match=match):
    _ortho(_normal(3, 4), **kw)


def test_errors_name_the_leaf():
  tree = {"b": _normal(3)}
  with pytest.raises(ValueError, match=r"rank >= 2, got shape \(3,\) at.*'b'"):
    ops.orthogonalize_tree(tree, Dims(-2, -1))
