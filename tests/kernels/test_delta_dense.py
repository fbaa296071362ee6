"""Delta gradient descent: its three forms and its limits (identities 3-5)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax import optim
from nl_jax.kernels import delta_dense as ops


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


def _normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def _close(a, b, tol=1e-12):
  np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


_SWITCHES = pytest.mark.parametrize(
  ("reduce", "norm"),
  [(r, n) for r in ("mean", "sum") for n in ("unit", "none")],
)
_DECAY = 0.7


def _key(x, norm):
  if norm == "none":
    return x
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _task(y):
  return jnp.mean(jnp.sin(y) * y)


def _augmented(x, w, reduce, norm):
  """The loss whose SGD is DGD, and its input gradient a plain layer's."""
  penalty = jnp.sum((jax.lax.stop_gradient(_key(x, norm)) @ w) ** 2)
  tokens = np.prod(x.shape[:-1]) if reduce == "mean" else 1
  return _task(x @ w) + _DECAY / 2 * penalty / tokens


@_SWITCHES
@pytest.mark.parametrize("wrap", ["plain", "checkpoint", "jit"])
def test_3_three_forms_agree(reduce, norm, wrap):
  x, w = _normal(2, 5, 6), _normal(6, 4, seed=1)
  layer = lambda x, w: ops.delta_dense(
    x, w, decay=_DECAY, reduce=reduce, input_norm=norm
  )
  wrapped = {"plain": layer, "checkpoint": jax.checkpoint(layer)}
  wrapped = wrapped.get(wrap) or jax.jit(layer)
  _close(wrapped(x, w), x @ w)
  dx, dw = jax.grad(lambda x, w: _task(wrapped(x, w)), (0, 1))(x, w)
  plain_dx, plain_dw = jax.grad(lambda x, w: _task(x @ w), (0, 1))(x, w)
  _close(dx, plain_dx)
  _close(dw, jax.grad(_augmented, 1)(x, w, reduce, norm))

  k = _key(x, norm).reshape(-1, 6)
  gram = k.T @ k / (len(k) if reduce == "mean" else 1)
  tx = optim.scale_by_delta_gradient(_DECAY)
  tree = {"w": plain_dw, "b": jnp.ones(4)}
  params = {"w": w, "b": jnp.ones(4)}
  got, _ = tx.update(
    tree, tx.init(params), params, input_gram={"w": gram, "b": None}
  )
  _close(dw, got["w"])
  _close(got["b"], 1.0, 0)


def test_3_under_scan_and_vmap():
  xs, w = _normal(3, 5, 6), _normal(6, 4, seed=1)
  loss = lambda w, x: _task(ops.delta_dense(x, w, decay=_DECAY))
  want = [jax.grad(loss)(w, x) for x in xs]
  _close(jax.vmap(jax.grad(loss), (None, 0))(w, xs), jnp.stack(want))

  def total(w):
    step = lambda c, x: (c + loss(w, x), None)
    return jax.lax.scan(step, 0.0, xs)[0]

  _close(jax.grad(total)(w), sum(want))


def test_3_as_dot_general_of_a_dense_layer():
  x, w = _normal(2, 5, 6), _normal(6, 4, seed=1)
  dot = ops.delta_dot_general(decay=_DECAY, reduce="sum", input_norm="none")
  numbers = (((2,), (0,)), ((), ()))
  loss = lambda w: _task(dot(x, w, numbers, precision=None))
  _close(jax.grad(loss)(w), jax.grad(_augmented, 1)(x, w, "sum", "none"))
  with pytest.raises(ValueError, match="contracts the last axis"):
    dot(x, w, (((1,), (0,)), ((), ())))


def test_num_tokens_is_the_global_number():
  x, w = _normal(8, 6), _normal(6, 4, seed=1)
  loss = lambda w, x, n=None: jnp.sum(ops.delta_dense(x, w, num_tokens=n) * 0.1)
  halves = sum(jax.grad(loss)(w, half, 8) for half in (x[:4], x[4:]))
  _close(halves, jax.grad(loss)(w, x))


def test_padding_is_finite_to_second_order():
  x, w = jnp.zeros((3, 6)), _normal(6, 4)
  slope = lambda x: jnp.sum(
    jax.grad(lambda w: _task(ops.delta_dense(x, w)))(w) ** 2
  )
  assert not jax.grad(lambda w: _task(ops.delta_dense(x, w)))(w).any()
  assert jnp.isfinite(jax.grad(slope)(x)).all()


@pytest.mark.parametrize(
  ("kw", "match"),
  [
    ({"reduce": "max"}, "reduce must be"),
    ({"input_norm": "l2"}, "input_norm must be"),
    ({"reduce": "sum", "num_tokens": 3}, "num_tokens is for"),
  ],
)
def test_bad_switches(kw, match):
  with pytest.raises(ValueError, match=match):
    ops.delta_dense(_normal(3, 6), _normal(6, 4), **kw)
  with pytest.raises(ValueError, match="form must be"):
    ops.delta_prox(_normal(6, 4), _normal(3, 6), _normal(3, 4), 0.1, form="x")


@pytest.mark.parametrize("T", [3, 9])
@pytest.mark.parametrize("decay", [1.0, 0.4])
def test_4_prox_is_the_solution_and_the_minimiser(T, decay):
  W, x, u, eta = (
    _normal(6, 4),
    _normal(T, 6, seed=1),
    _normal(T, 4, seed=2),
    0.3,
  )
  got = ops.delta_prox(W, x, u, eta, decay=decay)
  primal = np.linalg.solve(np.eye(6) + eta * decay * x.T @ x, W + eta * x.T @ u)
  _close(got, primal)
  V = W + eta * x.T @ u
  dual = V - decay * x.T @ np.linalg.solve(
    np.eye(T) / eta + decay * x @ x.T, x @ V
  )
  _close(got, dual)

  def objective(w):
    fit = decay / 2 * jnp.sum((x @ w) ** 2) - jnp.sum((x @ w) * u)
    return fit + jnp.sum((w - W) ** 2) / (2 * eta)

  _close(jax.grad(objective)(got), jnp.zeros((6, 4)), 1e-11)


@pytest.mark.parametrize("form", ["prox", "sequential"])
def test_4_one_token_is_the_rank_one_step(form):
  W, x, u, eta = (
    _normal(6, 4),
    _normal(1, 6, seed=1),
    _normal(1, 4, seed=2),
    0.8,
  )
  rate = eta / (1 + eta * jnp.sum(x**2))
  want = W - rate * (x.T @ (x @ W) - x.T @ u)
  _close(ops.delta_prox(W, x, u, eta, form=form), want)


def test_4_small_steps_are_linear_and_sequential_is_a_scan():
  W, x, u = _normal(6, 4), _normal(5, 6, seed=1), _normal(5, 4, seed=2)
  for eta in (1e-3, 1e-4):
    linear = ops.delta_prox(W, x, u, eta, form="linear")
    gap = jnp.abs(ops.delta_prox(W, x, u, eta) - linear).max()
    assert gap < 1e3 * eta**2
  want = W
  for t in range(5):
    want = ops.delta_prox(want, x[t : t + 1], u[t : t + 1], 0.8)
  _close(ops.delta_prox(W, x, u, 0.8, form="sequential"), want)


def test_prox_takes_batch_axes_and_is_stable_for_every_rate():
  W, x, u = _normal(2, 3, 6, 4), _normal(2, 3, 5, 6), _normal(2, 3, 5, 4)
  for form in ("prox", "linear", "sequential"):
    got = ops.delta_prox(W, x, u, 0.1, form=form)
    one = ops.delta_prox(W[1, 2], x[1, 2], u[1, 2], 0.1, form=form)
    _close(got[1, 2], one)
  far = ops.delta_prox(W, x, jnp.zeros_like(u), 1e6)
  assert (jnp.linalg.norm(far) <= jnp.linalg.norm(W)).all()


def _orthonormal(n, c, seed=0):
  return jnp.linalg.qr(_normal(c, n, seed=seed))[0].T


def test_5_recalls_orthonormal_keys_and_overwrites():
  keys, values = _orthonormal(4, 8), _normal(4, 3, seed=1)

  def write(W, k, v):
    loss = lambda W: (
      -jnp.sum(ops.delta_dense(k[None], W, reduce="sum") * v[None])
    )
    return W - jax.grad(loss)(W)

  W = _normal(8, 3, seed=2)
  for k, v in zip(keys, values):
    W = write(W, k, v)
  _close(keys @ W, values)
  W = write(W, keys[1], 2 * values[0])
  _close(keys[1] @ W, 2 * values[0])
  _close(keys[2] @ W, values[2])


def test_5_on_an_l2_loss_it_stops_half_way():
  X, goal = _orthonormal(6, 6), _normal(6, 3, seed=1)

  def loss(W):
    y = ops.delta_dense(X, W, reduce="sum", input_norm="none")
    return 0.5 * jnp.sum((y - X @ goal) ** 2)

  W = jnp.zeros((6, 3))
  for _ in range(100):
    W = W - 0.4 * jax.grad(loss)(W)
  _close(W, goal / 2)
