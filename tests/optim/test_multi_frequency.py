"""Laws of per-group update periods (docs/mathematics.md 10.10)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nl_jax import optim

_LABELS = {"a": {"w": "fast", "b": "slow"}, "c": "slow"}


def _tree(seed, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  one = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {"a": {"w": one(3, 2), "b": one(2)}, "c": one(4)}


def _run(tx, steps, params=None, **extra):
  params = _tree(0) if params is None else params
  dtype = jax.tree.leaves(params)[0].dtype
  state = tx.init(params)
  update = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra))
  path = []
  for t in range(steps):
    updates, state = update(_tree(t + 1, dtype), state, params)
    params = optax.apply_updates(params, updates)
    path.append(params)
  return path, state


def _equal(x, y, tol=1e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tol, tol), x, y)


def _all(period, inner=None, **kw):
  inner = optax.adamw(1e-2) if inner is None else inner
  return optim.multi_frequency(
    inner, {"all": period}, lambda p: jax.tree.map(lambda _: "all", p), **kw
  )


@pytest.mark.parametrize("period", [0, 1])
def test_period_one_is_the_inner_optimizer(period):
  _equal(_run(_all(period), 5)[0], _run(optax.adamw(1e-2), 5)[0], 0)


@pytest.mark.parametrize("mode", ["select", "cond"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_one_group_is_multi_steps(mode, reduce):
  with jax.enable_x64(True):
    params = _tree(0, jnp.float64)
    ours, _ = _run(_all(3, mode=mode, reduce=reduce), 10, params)
    wrapped = optax.MultiSteps(
      optax.adamw(1e-2),
      3,
      use_grad_mean=reduce == "mean",
      accumulator_dtype=jnp.float64,
    )
    theirs, _ = _run(wrapped, 10, params)
    _equal(ours, theirs, 1e-12)


@pytest.mark.parametrize("accumulate", ["gradients", "updates"])
def test_cond_equals_select(accumulate):
  # To the bit where a compiler does not fuse the two in its own ways.
  with jax.disable_jit():
    runs = [
      _run(_all(3, accumulate=accumulate, mode=mode), 7)[0]
      for mode in ("select", "cond")
    ]
  _equal(*runs, 0)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_gradients_equal_updates_for_sgd(reduce):
  runs = [
    _run(_all(4, optax.sgd(0.1), accumulate=kind, reduce=reduce), 9)[0]
    for kind in ("gradients", "updates")
  ]
  _equal(*runs)


def test_updates_run_the_inner_optimizer_every_step():
  _, state = _run(_all(4, accumulate="updates"), 6)
  assert state.inner["all"][0].count == 6
  _, state = _run(_all(4), 6)
  assert state.inner["all"][0].count == 1


def test_tokens_equal_steps():
  tokens = _all(2048, unit="tokens", tokens_per_step=512)
  _equal(_run(tokens, 9)[0], _run(_all(4), 9)[0], 0)
  _, state = _run(tokens, 9)
  assert state.fired["all"] == 2 and state.phase["all"] == 512


def test_a_period_of_one_step_keeps_no_accumulator():
  tx = _all(512, unit="tokens", tokens_per_step=512)
  assert not tx.init(_tree(0)).acc
  _equal(_run(tx, 3)[0], _run(_all(1), 3)[0], 0)


def test_odd_token_counts_fire_at_the_crossings():
  tx = _all(1000, optax.sgd(1.0), unit="tokens")
  params = _tree(0)
  state = tx.init(params)
  update = jax.jit(lambda g, s, p, n: tx.update(g, s, p, tokens=n))
  for t in range(1, 30):
    _, state = update(params, state, params, 384)
    assert state.fired["all"] == t * 384 // 1000
    assert state.phase["all"] == t * 384 % 1000


def test_groups_are_independent_and_frozen_groups_stay():
  periods = {"fast": 1, "slow": None}
  path, state = _run(
    optim.multi_frequency(optax.adamw(1e-2), periods, _LABELS), 4
  )
  _equal(path[-1]["c"], _tree(0)["c"], 0)
  assert "slow" not in state.inner
  both, _ = _run(
    optim.multi_frequency(
      {"fast": optax.adamw(1e-2), "slow": optax.sgd(0.1)},
      {"fast": 1, "slow": 2},
      _LABELS,
    ),
    4,
  )
  _equal(both[-1]["a"]["w"], path[-1]["a"]["w"], 0)
  _equal(both[-1]["c"], _run(_all(2, optax.sgd(0.1)), 4)[0][-1]["c"], 0)


def test_fire_flushes_and_holds():
  tx = _all(4, optax.sgd(1.0))
  flushed, state = _run(tx, 1, fire={"all": True})
  _equal(flushed[-1], jax.tree.map(jnp.subtract, _tree(0), _tree(1)))
  assert state.phase["all"] == 0 and state.n_acc["all"] == 0
  held, state = _run(tx, 6, fire={"all": False})
  _equal(held[-1], _tree(0), 0)
  assert state.n_acc["all"] == 6
  text = str(
    jax.make_jaxpr(
      lambda g, s: _all(4, mode="cond").update(g, s, g, fire={"all": True})
    )(_tree(0), _all(4).init(_tree(0)))
  )
  assert "cond[" not in text


def test_fire_refuses_groups_that_never_wait():
  tx = _all(1)
  with pytest.raises(ValueError, match="only groups that wait"):
    tx.update(_tree(0), tx.init(_tree(0)), fire={"all": False})


def test_labels_tolerate_masked_nodes_and_prefixes():
  inner = optim.multi_frequency(
    optax.sgd(1.0), {"fast": 1, "slow": 2}, {"a": "fast", "c": "slow"}
  )
  tx = optax.masked(inner, {"a": {"w": True, "b": False}, "c": True})
  state = tx.init(_tree(0))
  updates, state = tx.update(_tree(1), state, _tree(0))
  _equal(updates["a"]["w"], -_tree(1)["a"]["w"], 0)
  _equal(updates["a"]["b"], _tree(1)["a"]["b"], 0)
  _equal(updates["c"], 0 * _tree(1)["c"], 0)


def test_bf16_gradients_are_gathered_in_float32():
  tx = _all(64, optax.sgd(1.0))
  params = _tree(0, jnp.bfloat16)
  state = tx.init(params)
  assert {x.dtype for x in jax.tree.leaves(state.acc)} == {jnp.float32.dtype}
  update = jax.jit(tx.update)
  ones = jax.tree.map(jnp.ones_like, params)
  for _ in range(64):
    updates, state = update(ones, state, params)
  _equal(updates, jax.tree.map(lambda x: -64 * x, ones), 0)
  assert updates["c"].dtype == jnp.bfloat16


def test_reclocked_schedules_count_outer_steps():
  schedule = optax.linear_schedule(1.0, 0.0, 8)
  tx = _all(4, optax.sgd(optim.reclock_schedule(schedule, 4)), reduce="mean")
  params, ones = _tree(0), jax.tree.map(jnp.ones_like, _tree(0))
  state = tx.init(params)
  seen = []
  for _ in range(8):
    updates, state = tx.update(ones, state, params)
    seen.append(float(updates["c"][0]))
  assert seen == [0, 0, 0, -1.0, 0, 0, 0, -0.5]


def test_cms_periods():
  got = optim.cms_periods(16, {"low": 1, "mid": 4, "high": 16, "none": 0})
  assert got == {"low": 16, "mid": 4, "high": 1, "none": None}
  with pytest.raises(ValueError, match="must divide"):
    optim.cms_periods(16, {"mid": 3})


@pytest.mark.parametrize(
  ("kw", "match"),
  [
    ({"unit": "batches"}, "unit must be one of"),
    ({"reduce": "max"}, "reduce must be one of"),
    ({"accumulate": "weights"}, "accumulate must be one of"),
    ({"mode": "skip"}, "mode must be one of"),
    ({"periods": {"fast": -1, "slow": 1}}, "integer >= 0"),
    ({"periods": {"fast": 1}}, "slow.* have no period"),
    ({"inner": {"fast": optax.sgd(1.0)}}, "no inner optimizer.*slow"),
  ],
)
def test_bad_arguments(kw, match):
  given = dict(inner=optax.sgd(1.0), periods={"fast": 1, "slow": 2})
  given |= {"labels": _LABELS} | kw
  with pytest.raises(ValueError, match=match):
    optim.multi_frequency(**given)


def test_bad_labels_and_tokens_at_first_use():
  late = optim.multi_frequency(optax.sgd(1.0), {"x": 1}, lambda p: _LABELS)
  with pytest.raises(ValueError, match="have no period"):
    late.init(_tree(0))
  tx = _all(4, unit="tokens")
  with pytest.raises(ValueError, match="tokens_per_step"):
    tx.update(_tree(0), tx.init(_tree(0)))
  tx = _all(4, unit="tokens", tokens_per_step=2)
  with pytest.raises(ValueError, match="tokens_per_step=None"):
    tx.update(_tree(0), tx.init(_tree(0)), tokens=3)


def test_state_maps_and_builds_abstractly():
  tx = optim.multi_frequency(optax.adamw(1e-2), {"fast": 1, "slow": 2}, _LABELS)
  state = tx.init(_tree(0))
  doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
  assert float(doubled.acc["slow"]["c"][0]) == 1.0
  abstract = jax.eval_shape(tx.init, _tree(0))
  assert jax.tree.structure(abstract) == jax.tree.structure(state)
