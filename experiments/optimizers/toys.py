"""Toy problems with a provable or known verdict (spec 6.5); seconds to run."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nl_jax import optim

_C, _R = 64, 8


def _keys(n: int, coherence: float, seed: int = 0) -> np.ndarray:
  """n unit keys [n, c], any two with this inner product on average."""
  rng = np.random.default_rng(seed)
  common = rng.normal(size=_C)
  common /= np.linalg.norm(common)
  own = rng.normal(size=(n, _C))
  own -= own @ common[:, None] * common
  own /= np.linalg.norm(own, axis=1, keepdims=True)
  return coherence**0.5 * common + (1 - coherence) ** 0.5 * own


def _write(keys, values, decay, passes, rate=1.0):
  """Error after `passes` over the tokens of the dot-product loss."""
  W = jnp.zeros((_C, _R))

  def token(W, kv):
    k, v = kv
    loss = lambda W: (
      -jnp.sum(
        optim.delta_dense(k[None], W, decay=decay, reduce="sum") * v[None]
      )
    )
    return W - rate * jax.grad(loss)(W), None

  for _ in range(passes):
    W, _ = jax.lax.scan(token, W, (keys, values))
  error = jnp.linalg.norm(keys @ W - values, axis=1)
  return float(jnp.mean(error / jnp.linalg.norm(values, axis=1)))


def recall() -> list[dict]:
  """GD and DGD on the dot-product loss, keys of growing coherence."""
  rows = []
  for n, coherence, passes in (
    (32, 0.0, 1), (32, 0.5, 1), (32, 0.5, 20), (60, 0.9, 1), (60, 0.9, 20),
  ):  # fmt: skip
    keys = _keys(n, coherence)
    if not coherence:
      keys = np.linalg.qr(keys.T)[0].T
    values = np.random.default_rng(1).normal(size=(n, _R))
    keys, values = jnp.asarray(keys), jnp.asarray(values)
    name = f"recall, {n} keys of coherence {coherence}, {passes} passes"
    gd = _write(keys, values, 0.0, passes)
    dgd = _write(keys, values, 1.0, passes)
    rows.append({"problem": name, "GD": gd, "DGD": dgd})
  return rows


def overwrite() -> list[dict]:
  """One of 8 orthonormal keys gets a new value."""
  keys = jnp.asarray(np.linalg.qr(_keys(8, 0.0).T)[0].T)
  rng = np.random.default_rng(1)
  values = jnp.asarray(rng.normal(size=(8, _R)))
  again = jnp.concatenate([keys, keys[:1]])
  new = jnp.asarray(rng.normal(size=(1, _R)))
  both = jnp.concatenate([values, new])
  row = {"problem": "overwritten key, orthonormal keys: error of all keys"}
  now = values.at[0].set(new[0])
  for name, decay in (("GD", 0.0), ("DGD", 1.0)):
    W = jnp.zeros((_C, _R))
    for k, v in zip(again, both):
      loss = lambda W, k=k, v=v, d=decay: (
        -jnp.sum(optim.delta_dense(k[None], W, decay=d, reduce="sum") * v[None])
      )
      W = W - jax.grad(loss)(W)
    row[name] = float(jnp.linalg.norm(keys @ W - now))
  return [row]


def teacher() -> list[dict]:
  """An L2 loss: GD finds the teacher, DGD half of it."""
  rng = np.random.default_rng(0)
  X = jnp.asarray(np.linalg.qr(rng.normal(size=(_C, _C)))[0])
  goal = jnp.asarray(rng.normal(size=(_C, _R)))
  row = {"problem": "L2 loss with a teacher: norm of W / norm of the teacher"}
  for name, decay in (("GD", 0.0), ("DGD", 1.0)):

    def loss(W, decay=decay):
      y = optim.delta_dense(X, W, decay=decay, reduce="sum", input_norm="none")
      return 0.5 * jnp.sum((y - X @ goal) ** 2)

    W = jnp.zeros((_C, _R))
    step = jax.jit(lambda W, loss=loss: W - 0.3 * jax.grad(loss)(W))
    for _ in range(200):
      W = step(W)
    row[name] = float(jnp.linalg.norm(W) / jnp.linalg.norm(goal))
  return [row]


def stability() -> list[dict]:
  """A repeated stream of keys with eta' |x|^2 inside and outside [0, 2]."""
  keys = jnp.asarray(_keys(16, 0.5))
  values = jnp.zeros((16, _R)).at[:, 0].set(1.0)
  rows = []
  for rate in (0.5, 1.9, 2.5):
    name = f"dot-product loss, rate {rate}: error after 40 passes"
    row = {"problem": name}
    for rule, decay in (("GD", 0.0), ("DGD", 1.0)):
      row[rule] = _write(keys, values, decay, 40, rate)
    rows.append(row)
  return rows


def tasks() -> list[dict]:
  """Two regression tasks one after the other: loss of the first at the end."""
  rng = np.random.default_rng(0)
  rows = []
  arms = {
    "momentum": optax.sgd(0.1, 0.9),
    "delta momentum": optim.delta_momentum(0.1),
    "Muon": optim.m3(0.02, 0.9, alpha=None, second_moment=None),
    "M3": optim.m3(0.02, 0.9, slow_every=10, second_moment=None),
  }
  for coherence in (0.0, 0.5):
    X = np.linalg.qr(rng.normal(size=(_C, _C)))[0][:32]
    # Task 2 reads directions that overlap with those of task 1.
    second = coherence**0.5 * X[:16] + (1 - coherence) ** 0.5 * X[16:]
    pair = [(jnp.asarray(x), jnp.asarray(rng.normal(size=(16, 16))))
            for x in (X[:16], second)]  # fmt: skip
    row = {"problem": f"second task, overlap {coherence}: loss of the first"}
    for name, tx in arms.items():
      row[name] = _two_tasks(tx, pair)
    rows.append(row)
  return rows


def _two_tasks(tx, pair):
  def run(carry, task):
    x, y = task

    def step(carry, _):
      W, state = carry
      loss = lambda W: 0.5 * jnp.mean(jnp.sum((x @ W - y) ** 2, axis=1))
      u, state = tx.update(jax.grad(loss)(W), state, W)
      return (optax.apply_updates(W, u), state), None

    return jax.lax.scan(step, carry, length=300)[0]

  W = jnp.zeros((_C, 16))
  carry = (W, tx.init(W))
  for task in pair:
    carry = jax.jit(run)(carry, task)
  x, y = pair[0]
  return float(0.5 * jnp.mean(jnp.sum((x @ carry[0] - y) ** 2, axis=1)))


_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_ALPHAS = (0.5, 0.8, 0.9, 0.95)
_ERASES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_RULES = {
  "momentum": None,
  "element linear": "linear",
  "element clip": "clip",
  "element implicit": "implicit",
}


def curved_valley(steps: int = 1000) -> list[dict]:
  """Eq. 53: steps to 1e-3, best of the grid, and the fraction that gets there.

  The paper gives no k, a, omega or rates; the grid is ours.
  """
  rows = []
  for k, a, omega in ((1, 1, 1), (1, 1, 3), (1, 1, 5), (5, 1, 2),
                      (10, 0.5, 3), (1, 2, 8)):  # fmt: skip
    row = {"problem": f"eq. 53, (k, a, omega) = ({k}, {a}, {omega})"}
    psi = lambda p, k=k, a=a, w=omega: (
      p[0] ** 2 + k * (p[0] - p[1] + a * jnp.sin(w * p[0])) ** 2
    )
    for name, decay in _RULES.items():
      erases = _ERASES if decay else (0.0,)
      grid = jnp.asarray(list(itertools.product(_RATES, _ALPHAS, erases)))
      when = np.asarray(_valley(psi, decay, grid, steps))
      best, solved = when.min(), (when <= steps).mean()
      row[name] = f"{best if best <= steps else 'never'} ({solved:.2f})"
    rows.append(row)
  return rows


def _valley(psi, decay, grid, steps):
  """First step below 1e-3 for each row (rate, alpha, eta_d) of the grid."""

  def one(h):
    rate, alpha, erase = h
    tx = optax.trace(alpha)
    if decay:
      tx = optim.scale_by_delta_momentum(
        alpha, eta_decay=erase, decay=decay, granularity="element", key="raw"
      )
    p = jnp.asarray([-3.5, 2.0])

    def step(carry, _):
      p, state = carry
      u, state = tx.update(jax.grad(psi)(p), state)
      p = p - rate * u
      return (p, state), psi(p) < 1e-3

    _, below = jax.lax.scan(step, (p, tx.init(p)), length=steps)
    return jnp.where(below.any(), jnp.argmax(below) + 1, steps + 1)

  return jax.jit(jax.vmap(one))(grid)


PROBLEMS = {
  f.__name__: f
  for f in (recall, overwrite, teacher, stability, tasks, curved_valley)
}
