"""Sharded equals unsharded for every optimizer (identity 23)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import bound_multi_frequency
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nl_jax import optim

_SPECS = {"stack": P(None, "x", None), "wide": P(None, "x"), "bias": P("x")}
_PLAN = optim.NSSharding(("x",), _SPECS)
_ALL = {
  "m3": optim.m3(1e-2, slow_every=2),
  "m3_staggered": optim.m3(
    1e-2, slow_every=2, ns=optim.NewtonSchulz(sharding=_PLAN), stagger=True
  ),
  "delta_matrix": optim.delta_momentum(1e-2),
  "delta_implicit": optim.delta_momentum(1e-2, decay="implicit"),
  "delta_tensor": optim.delta_momentum(1e-2, granularity="tensor"),
  "delta_element": optim.delta_momentum(1e-2, granularity="element"),
  "left_gram": optim.scale_by_preconditioned_momentum(
    optim.left_gram_preconditioner(eps=1e-2)
  ),
  "diag": optim.scale_by_preconditioned_momentum(optim.diag_preconditioner()),
  "tanh": optim.scale_by_feature_momentum(),
  "deep_mlp": optim.deep_momentum(
    1e-2,
    vector_rule="mlp",
    output="orthogonalize",
    ns=optim.NewtonSchulz(sharding=_PLAN),
  ),
  "adam_memory": optim.adam_memory(1e-2),
  "adagrad_matrix": optim.adagrad_memory(1e-2, granularity="matrix"),
  "multi_frequency": bound_multi_frequency(1e-2),
}


def _params(seed=0):
  shapes = {"stack": (8, 16, 4), "wide": (8, 16), "bias": (8,)}
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    k: jax.random.normal(key, s) for key, (k, s) in zip(keys, shapes.items())
  }


def _run(tx, place):
  params = place(_params())
  state = jax.jit(tx.init)(params)
  types = jax.tree.map(jax.typeof, state)

  @jax.jit
  def step(g, state, params):
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state

  for t in range(3):
    params, state = step(place(_params(t + 1)), state, params)
  return params, types, jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize("name", _ALL)
def test_sharded_equals_unsharded(name):
  plain = {
    "m3_staggered": optim.m3(1e-2, slow_every=2, stagger=True),
    "deep_mlp": optim.deep_momentum(
      1e-2, vector_rule="mlp", output="orthogonalize"
    ),
  }
  # In float64: roots of Gram matrices magnify how float32 sums are ordered.
  with jax.enable_x64(True):
    _compare(name, plain.get(name, _ALL[name]))


def _compare(name, plain):
  want, _, _ = _run(plain, lambda t: t)
  for kind in ("Auto", "Explicit"):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(getattr(AxisType, kind),))
    shardings = {k: NamedSharding(mesh, s) for k, s in _SPECS.items()}
    place = lambda t, s=shardings: jax.tree.map(jax.device_put, t, s)
    with jax.set_mesh(mesh):
      got, before, after = _run(_ALL[name], place)
    if kind == "Explicit":
      assert before == after
    compare = lambda a, b: np.testing.assert_allclose(
      np.asarray(a), b, rtol=1e-8, atol=1e-9
    )
    jax.tree.map(compare, got, want)


def _hlo(tx, kind="Auto"):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(getattr(AxisType, kind),))
  sharding = NamedSharding(mesh, P(None, "x", None))
  with jax.set_mesh(mesh):
    w = jax.device_put(jnp.ones((16, 16, 8)), sharding)
    state = jax.jit(tx.init)(w)
    state = jax.tree.map(
      lambda s: jax.device_put(s, sharding) if s.ndim == 3 else s, state
    )
    return jax.jit(tx.update).lower(w, state).compile().as_text()


def _count(text, kind):
  return text.count(f" {kind}(") + text.count(f" {kind}-start(")


def test_a_whole_m3_step_is_four_all_to_alls():
  plan = optim.NSSharding(("x",), P(None, "x", None))
  text = _hlo(
    optim.scale_by_m3(
      second_moment=None, slow_every=4, ns=optim.NewtonSchulz(sharding=plan)
    )
  )
  assert _count(text, "all-to-all") == 4
  assert _count(text, "all-gather") == 0


@pytest.mark.parametrize("mode", ["select", "cond"])
def test_multi_frequency_moves_nothing(mode):
  tx = optim.multi_frequency(
    optim.scale_by_adam_memory(), {"all": 4}, lambda p: "all", mode=mode
  )
  text = _hlo(tx)
  for kind in ("all-to-all", "all-gather", "all-reduce"):
    assert _count(text, kind) == 0
