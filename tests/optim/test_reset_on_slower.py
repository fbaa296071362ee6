"""Nested CMS against a plain loop (paper eq. 72)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nl_jax import optim

_PERIODS = {"high": 1, "mid": 2, "low": 6, "slow": 0}
_ORDER = ("high", "mid", "low")
_NAMES = list(_PERIODS)


def _gradient(t, name, value):
  return np.sin(t + 1 + _NAMES.index(name)) + 0.1 * value


def _loop(steps, meta, rate, lr=0.1):
  """SGD by level on one number each, as eq. 72 says it."""
  params = {k: 1.0 + i for i, k in enumerate(_NAMES)}
  start, acc = dict(params), dict.fromkeys(_NAMES, 0.0)
  path = []
  for t in range(1, steps + 1):
    fired, last = set(), {}
    for name, value in params.items():
      acc[name] += _gradient(t, name, value)
    for name, period in _PERIODS.items():
      if t % max(period, 1) == 0:
        last[name] = -lr * acc[name]
        params[name] += last[name]
        acc[name] = 0.0
        fired.add(name)
    for fast, slow in zip(_ORDER, _ORDER[1:]):
      if slow in fired:
        if meta == "reptile":
          start[fast] += rate * (params[fast] - start[fast])
        elif meta == "fomaml":
          start[fast] += rate * last[fast]
        params[fast] = start[fast]
    path.append([params[k] for k in _NAMES])
  return np.asarray(path)


def _transform(meta, rate, mode="select"):
  labels = {k: k for k in _NAMES}
  inner = optim.multi_frequency(optax.sgd(0.1), _PERIODS, labels, mode=mode)
  return optim.reset_on_slower(
    inner, _PERIODS, labels, order=_ORDER, meta=meta, meta_rate=rate
  )


@pytest.mark.parametrize("mode", ["select", "cond"])
@pytest.mark.parametrize(
  ("meta", "rate"), [("none", 1.0), ("reptile", 0.3), ("fomaml", 0.5)]
)
def test_equals_the_plain_loop(meta, rate, mode):
  with jax.enable_x64(True):
    tx = _transform(meta, rate, mode)
    params = {k: jnp.asarray(1.0 + i) for i, k in enumerate(_NAMES)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    path = []
    for t in range(1, 20):
      grads = {k: _gradient(t, k, v) for k, v in params.items()}
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)
      path.append([float(params[k]) for k in _NAMES])
  np.testing.assert_allclose(path, _loop(19, meta, rate), rtol=1e-12)


def test_reptile_at_rate_one_never_moves_back():
  reset, plain = _transform("reptile", 1.0), _transform("none", 1.0)
  params = {k: jnp.asarray(1.0 + i) for i, k in enumerate(_NAMES)}
  states = [reset.init(params), plain.init(params)]
  grads = jax.tree.map(jnp.ones_like, params)
  for t in range(1, 7):
    u, states[0] = reset.update(grads, states[0], params)
    v, states[1] = plain.update(grads, states[1], params)
    if t == 2:  # mid fires for the first time: only the plain form goes back.
      np.testing.assert_allclose(u["high"], -0.1, rtol=1e-5)
      np.testing.assert_allclose(v["high"], 0.0, atol=1e-6)


def test_slowest_level_keeps_no_start():
  state = _transform("none", 1.0).init({k: jnp.ones(()) for k in _NAMES})
  assert len(jax.tree.leaves(state.start)) == 2
  assert state.start["low"] == state.start["slow"] == optax.MaskedNode()


@pytest.mark.parametrize(
  ("kw", "match"),
  [
    ({"meta": "full"}, "needs in-context CMS"),
    ({"meta": "maml"}, "meta must be one of"),
    ({"order": ("high", "top")}, "no period"),
    ({"order": ("low", "mid")}, "multiple"),
  ],
)
def test_bad_arguments(kw, match):
  given = {"order": _ORDER} | kw
  with pytest.raises(ValueError, match=match):
    optim.reset_on_slower(optax.sgd(0.1), _PERIODS, {}, **given)


def test_needs_params():
  tx = _transform("none", 1.0)
  tree = {k: jnp.ones(()) for k in _NAMES}
  with pytest.raises(ValueError, match="params"):
    tx.update(tree, tx.init(tree))
