"""Every optimizer in every setting that optax and its neighbours offer.

Each cell makes two steps on a few leaves of 4 x 4, and is held against the
same optimizer alone on the same leaves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from battery import bound_multi_frequency

from nl_jax import optim

RATE = 0.05
MAKE = {
  "m3": lambda learning_rate: optim.m3(learning_rate, slow_every=2),
  "m3_paper": optim.m3_paper,
  "delta_momentum": optim.delta_momentum,
  "deep_momentum": optim.deep_momentum,
  "adam_memory": optim.adam_memory,
  "adagrad_memory": optim.adagrad_memory,
  "multi_frequency": bound_multi_frequency,
}
every = pytest.mark.parametrize("name", MAKE)


def params(seed=0, dtype=jnp.float32):
  """Two layers as modules have them, and what else a tree may hold."""
  keys = iter(jax.random.split(jax.random.key(seed), 6))
  draw = lambda *shape: jax.random.normal(next(keys), shape, dtype)
  return {
    "a": {"kernel": draw(4, 4), "bias": draw(4)},
    "norm": {"scale": draw(4), "bias": draw(4)},
    "head": {"kernel": draw(4, 2), "bias": draw(2)},
  }


def steps(tx, p, grads=params):
  """Parameters and state after two steps; the update compiles once."""
  traces = []

  @jax.jit
  def step(g, state, p):
    traces.append(1)
    updates, state = tx.update(g, state, p)
    return optax.apply_updates(p, updates), state

  state = tx.init(p)
  for seed in (1, 2):
    p, state = step(grads(seed), state, p)
  assert len(traces) == 1
  return p, state


@functools.cache
def alone(name):
  return steps(MAKE[name](RATE), params())


@functools.cache
def _first(name):
  tx = MAKE[name](RATE)
  return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])


def first_step(name, grads):
  return optax.apply_updates(params(), _first(name)(grads, params()))


def same(a, b, rtol=1e-5, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def finite(tree):
  return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


@every
def test_lists_tuples_and_nothing(name):
  tree = lambda seed: (
    [params(seed)["a"]["kernel"], None],
    {"deep": {"er": (params(seed)["a"]["bias"],)}},
  )
  got, _ = steps(MAKE[name](RATE), tree(0), tree)
  assert got[0][1] is None and finite(got)
  if name != "deep_momentum":  # Its memories begin by the names of leaves.
    want, _ = alone(name)
    same(got[0][0], want["a"]["kernel"])
    same(got[1]["deep"]["er"][0], want["a"]["bias"])


@every
def test_inject_hyperparams(name):
  # A number for some, a schedule for others: each is one argument of all.
  rate = RATE if "m" in name[:1] else optax.linear_schedule(RATE, RATE, 10)
  got, state = steps(optax.inject_hyperparams(MAKE[name])(rate), params())
  same(got, alone(name)[0], 1e-4, 1e-5)
  assert float(state.hyperparams["learning_rate"]) == pytest.approx(RATE)


@pytest.mark.parametrize("make", [optim.muon, optim.deep_momentum])
def test_the_count_of_iterations_is_injected_too(make):
  output = {} if make is not optim.deep_momentum else {
    "output": "orthogonalize"
  }  # fmt: skip
  got, state = {}, {}
  for n in (0, 3):
    tx = optax.inject_hyperparams(make)(RATE, ns_steps=n, **output)
    got[n], state = steps(tx, params())
    want, _ = steps(make(RATE, ns_steps=n, **output), params())
    same(got[n], want, 1e-4, 1e-5)
  assert int(state.hyperparams["ns_steps"]) == 3
  assert jnp.abs(got[0]["a"]["kernel"] - got[3]["a"]["kernel"]).max() > 1e-3


@every
def test_masked_and_multi_transform(name):
  tx = MAKE[name](RATE)
  others = lambda p: jax.tree_util.tree_map_with_path(
    lambda path, _: "sgd" if path[0].key == "head" else "ours", p
  )
  groups = {"ours": tx, "sgd": optax.sgd(0.1)}
  got, _ = steps(optax.multi_transform(groups, others), params())
  mask = lambda p: jax.tree.map(lambda x: x == "ours", others(p))
  ours, _ = steps(optax.masked(tx, mask), params())
  want = alone(name)[0]
  moved = params()["head"]["kernel"]
  for seed in (1, 2):
    moved = moved - 0.1 * params(seed)["head"]["kernel"]
  same(got["head"]["kernel"], moved)
  for part in ("a", "norm"):
    same(got[part], want[part], 2e-4, 2e-5)
    same(ours[part], want[part], 2e-4, 2e-5)


@every
def test_frozen_leaves(name):
  labels = {"a": "train", "norm": "rest", "head": "train"}
  groups = {"train": MAKE[name](RATE), "rest": optax.set_to_zero()}
  got, state = steps(optax.partition(groups, labels), params())
  same(got["norm"], params()["norm"], 0, 0)
  same(got["head"], alone(name)[0]["head"], 2e-4, 2e-5)
  shapes = [x.shape for x in jax.tree.leaves(state)]
  assert shapes.count((4,)) <= len(shapes) // 2


@every
def test_multi_steps(name):
  tx = optax.MultiSteps(MAKE[name](RATE), 2)
  got, state = steps(tx, params())
  mean = jax.tree.map(lambda a, b: (a + b) / 2, params(1), params(2))
  same(got, first_step(name, mean), 1e-4, 1e-5)
  assert int(state.gradient_step) == 1


@every
def test_apply_if_finite(name):
  bad = lambda seed: jax.tree.map(
    lambda x: jnp.where(seed == 2, jnp.nan, x), params(seed)
  )
  got, state = steps(optax.apply_if_finite(MAKE[name](RATE), 3), params(), bad)
  same(got, first_step(name, params(1)), 1e-4, 1e-5)
  assert int(state.total_notfinite) == 1 and finite(state.inner_state)


@every
def test_schedule_free(name):
  tx = optax.contrib.schedule_free(MAKE[name](RATE), RATE, b1=0.9)
  got, state = steps(tx, params())
  read = optax.contrib.schedule_free_eval_params(state, got)
  assert finite((got, read))
  if name != "multi_frequency":  # Its first step comes after four.
    assert jnp.abs(read["a"]["kernel"] - params()["a"]["kernel"]).max() > 1e-6


@every
def test_bfloat16(name):
  half = functools.partial(params, dtype=jnp.bfloat16)
  got, state = steps(MAKE[name](RATE), half(0), half)
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
  assert finite((got, state))


@every
def test_donated_buffers(name):
  tx = MAKE[name](RATE)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(p, state, g):
    updates, state = tx.update(g, state, p)
    return optax.apply_updates(p, updates), state

  # Two leaves of a state that are one buffer could not be given away.
  p, state = params(), tx.init(params())
  for seed in (1, 2):
    p, state = step(p, state, params(seed))
  same(p, alone(name)[0], 1e-4, 1e-5)


@every
def test_saved_and_restored(name, tmp_path):
  p, state = alone(name)
  like = jax.eval_shape(lambda: MAKE[name](RATE).init(params()))
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "state", state)
    saver.wait_until_finished()
    again = saver.restore(tmp_path / "state", like)
  assert jax.tree.structure(again) == jax.tree.structure(state)
  same(again, state, 0, 0)


@every
def test_empty_and_narrow_leaves(name):
  shapes = {
    "empty": (0,), "tall": (4, 0), "flat": (0, 4), "no": (0, 4, 4),
    "row": (1, 4), "column": (4, 1), "one": (1, 1), "stack": (3, 1, 4),
    "zero": (), "plain": (4, 4),
  }  # fmt: skip
  draw = lambda seed: {
    k: jax.random.normal(jax.random.key(seed + i), shape)
    for i, (k, shape) in enumerate(shapes.items())
  }
  got, state = steps(MAKE[name](RATE), draw(0), draw)
  assert {k: x.shape for k, x in got.items()} == shapes
  assert finite((got, state))


def _nnx_model(nnx, values):
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.a = nnx.Linear(4, 4, rngs=rngs)
      self.norm = nnx.LayerNorm(4, rngs=rngs)
      self.head = nnx.Linear(4, 2, rngs=rngs)

  model = Model(nnx.Rngs(0))
  nnx.update(model, values)
  return model


@every
def test_flax_nnx(name):
  nnx = pytest.importorskip("flax.nnx")
  model = _nnx_model(nnx, params())
  optimizer = nnx.Optimizer(model, MAKE[name](RATE), wrt=nnx.Param)
  step = nnx.jit(lambda model, optimizer, g: optimizer.update(model, g))
  for seed in (1, 2):
    grads = nnx.state(_nnx_model(nnx, params(seed)), nnx.Param)
    step(model, optimizer, grads)
  got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  same(got, alone(name)[0], 1e-4, 1e-5)


@every
def test_equinox(name):
  eqx = pytest.importorskip("equinox")
  model = eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))
  weights = eqx.filter(model, eqx.is_inexact_array)
  grads = lambda seed: jax.tree.map(lambda x: jnp.cos(seed + 9 * x), weights)
  got, state = steps(MAKE[name](RATE), weights, grads)
  assert finite((got, state))
  bare = lambda tree: {
    jax.tree_util.keystr(path): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }
  if name == "m3":
    want, _ = steps(
      MAKE[name](RATE), bare(weights), lambda seed: bare(grads(seed))
    )
    same(bare(got), want, 1e-4, 1e-5)
  assert eqx.combine(got, model)(jnp.ones(4)).shape == (4,)
