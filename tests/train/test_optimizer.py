"""The outer optimizer: decay by path, periods, schedule, options."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nl_jax import card, sharding
from nl_jax.memory import self_modifying
from nl_jax.models import cms, lm
from nl_jax.train import optimizer
from nl_jax.train import state as state_lib
from tests.train import stub

TOKENS = stub.TOKENS


def make(model: stub.Model, **change) -> optimizer.Optimizer:
  arguments = dict(
    steps=12, tokens_per_step=TOKENS, learning_rate=0.1, clip_norm=0.0
  )
  return optimizer.make(model, **(arguments | change))


@jax.jit
def gradients(params, index: int):
  keys = jax.random.split(jax.random.key(index), len(jax.tree.leaves(params)))
  keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
  return jax.tree.map(lambda k, p: jax.random.normal(k, p.shape), keys, params)


def run(tx, params, steps: int = 8):
  """Parameters after each step."""
  update = jax.jit(tx.update)
  state, seen = jax.jit(tx.init)(params), [params]
  for i in range(steps):
    updates, state = update(gradients(params, i), state, seen[-1])
    seen.append(optax.apply_updates(seen[-1], updates))
  return seen


def level(params, name: str):
  return params["blocks"]["cms"][name]["w_up"]


def test_levels_fire_at_their_periods_and_rest_in_between():
  model = stub.Model((TOKENS, 2 * TOKENS, 4 * TOKENS))
  seen = run(make(model).tx, model.init(jax.random.key(0)))
  moved = lambda name: [
    i
    for i in range(1, 9)
    if bool(jnp.any(level(seen[i], name) != level(seen[i - 1], name)))
  ]
  assert moved("high") == [1, 2, 3, 4, 5, 6, 7, 8]
  assert moved("mid") == [2, 4, 6, 8]
  assert moved("low") == [4, 8]
  slow = [
    bool(jnp.any(a["embed"] != b["embed"])) for a, b in zip(seen, seen[1:])
  ]
  assert all(slow)


def test_periods_of_one_batch_are_the_base_optimizer():
  model = stub.Model((TOKENS, TOKENS))
  made = make(model, warmup_steps=2, weight_decay=0.1)
  base = optax.adamw(
    made.schedule, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=optimizer.decay_mask
  )
  params = model.init(jax.random.key(0))
  for a, b in zip(run(made.tx, params), run(base, params)):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), a, b
    )


def test_one_longer_period_is_multi_steps():
  model = stub.Model((4 * TOKENS, 4 * TOKENS))
  params = model.init(jax.random.key(0))
  made = make(model, weight_decay=0.1, warmup_steps=2)
  base = optax.adamw(
    lambda count: made.schedule(4 * count),
    *(0.9, 0.95, 1e-8),
    weight_decay=0.1,
    mask=optimizer.decay_mask,
  )
  base = optax.MultiSteps(base, 4).gradient_transformation()
  for a, b in zip(run(made.tx, params), run(base, params)):
    np.testing.assert_allclose(
      level(a, "mid"), level(b, "mid"), rtol=1e-5, atol=1e-6
    )


def test_nested_levels_restart_when_a_slower_one_fires():
  model = stub.Model((TOKENS, 4 * TOKENS), variant="nested")
  start = model.init(jax.random.key(0))
  seen = run(make(model).tx, start)
  for i in (4, 8):
    np.testing.assert_allclose(
      level(seen[i], "high"), level(start, "high"), atol=1e-6
    )
  assert float(jnp.max(jnp.abs(level(seen[3], "high") - level(start, "high"))))


def test_clip_stands_before_the_levels():
  model = stub.Model((TOKENS, 2 * TOKENS))
  params = model.init(jax.random.key(0))
  tx = make(model, clip_norm=1.0).tx
  grads = jax.tree.map(lambda x: 100 * x, gradients(params, 0))
  _, state = jax.jit(tx.update)(grads, tx.init(params), params)
  acc = optax.tree.get(state, "acc")["cms/mid"]
  total = optax.tree.norm(grads)
  np.testing.assert_allclose(
    level(acc, "mid"), level(grads, "mid") / total, rtol=1e-5
  )


def test_decay_is_decided_by_path():
  shapes = {
    "embed": (16, 8),
    "final_norm": {"scale": (8,)},
    "blocks": {
      "mixer_norm": {"scale": (2, 8)},
      "mixer": {
        "w_q": (2, 8, 8),
        "conv_q": (2, 4, 8),
        "norm": {"scale": (2, 4)},
        "memory": {
          "k": {"w_in": (2, 2, 4, 4)},
          "memory": {"w": (2, 2, 4, 4)},
          "gate": {"w_eta": (2, 2, 4), "b_eta": (2, 2), "b_alpha": (2, 2, 4)},
        },
      },
      "cms": {
        "high": {"norm": {"scale": (2, 8)}, "w_up": (2, 8, 8)},
        "mix": (2, 3),
      },
    },
  }
  params = jax.tree.map(
    jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  mask = jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params))
  decayed = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, value in mask
    if value
  }
  assert decayed == {
    "embed",
    "blocks/mixer/w_q",
    "blocks/mixer/memory/k/w_in",
    "blocks/mixer/memory/memory/w",
    "blocks/mixer/memory/gate/w_eta",
    "blocks/cms/high/w_up",
  }


def test_decay_moves_matrices_alone():
  model = stub.Model()
  params = model.init(jax.random.key(0))
  tx = make(model, weight_decay=0.5).tx
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zero, tx.init(params), params)
  assert float(jnp.max(jnp.abs(updates["final_norm"]["scale"]))) == 0
  np.testing.assert_allclose(
    updates["embed"], -0.05 * params["embed"], rtol=1e-5
  )


def test_schedule_warms_up_and_falls_to_a_tenth():
  rate = optimizer.schedule(2.0, 4, 24, 0.1)
  got = [float(rate(i)) for i in range(24)]
  np.testing.assert_allclose(got[:5], [0.5, 1, 1.5, 2, 2], rtol=1e-6)
  assert got[-1] == pytest.approx(0.2)
  assert all(a >= b for a, b in zip(got[4:], got[5:]))
  middle = 2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 5 / 19)))
  assert got[9] == pytest.approx(middle, rel=1e-5)
  assert float(rate(30)) == pytest.approx(0.2)
  assert float(optimizer.schedule(1.0, 0, 1, 0.1)(0)) == pytest.approx(1)


@pytest.mark.parametrize(
  ("change", "text"),
  [
    ({"name": "sdg"}, "optim.name must be one of .*adamw"),
    ({"learning_rate": -1.0}, "optim.learning_rate"),
    ({"weight_decay": float("nan")}, "optim.weight_decay"),
    ({"min_ratio": 2.0}, "from 0 to 1"),
    ({"steps": 0}, "train.steps"),
    ({"options": {"alpha": 0.9}}, "no option alpha; it has none but b1"),
    ({"name": "m3", "options": {"mask": 1}}, "no option mask; it has b1,"),
    ({"name": "muon", "options": {"alpha": 1}}, "no option alpha"),
  ],
)
def test_bad_arguments(change, text):
  with pytest.raises(ValueError, match=text):
    make(stub.Model(), **change)


def test_period_that_is_no_multiple_of_a_batch():
  with pytest.raises(ValueError, match="nearest: 32 or 64"):
    make(stub.Model((TOKENS, 50)))


MODEL = lm.LanguageModel(
  arch="hope",
  width=32,
  layers=2,
  heads=2,
  head_dim=16,
  vocab_size=64,
  sequence_length=16,
  cms=cms.CMSConfig(("high", "low"), (32, 32), (TOKENS, 2 * TOKENS)),
  mixer=self_modifying.Config(),
)


@pytest.fixture(scope="module")
def params():
  return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.mark.parametrize("name", optimizer.RULES)
def test_every_rule_updates_every_parameter(name, params):
  tx = make(MODEL, name=name, clip_norm=1.0).tx
  seen = run(tx, params, steps=2)
  for path, moved in jax.tree_util.tree_leaves_with_path(
    jax.tree.map(lambda a, b: bool(jnp.all(a != b)), seen[0], seen[2])
  ):
    assert moved, jax.tree_util.keystr(path)
  assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(seen[2]))


def test_matrices_and_others_of_muon(params):
  muon, adamw = (
    run(make(MODEL, name=name).tx, params, steps=1)[1]
    for name in ("muon", "adamw")
  )
  same = jax.tree.map(
    lambda a, b: bool(jnp.allclose(a, b, rtol=1e-5, atol=1e-6)), muon, adamw
  )
  mixer = same["blocks"]["mixer"]
  assert same["embed"] and same["final_norm"]["scale"]
  assert mixer["conv_q"] and mixer["norm"]["scale"]
  assert mixer["memory"]["gate"]["b_eta"] and mixer["memory"]["gate"]["w_eta"]
  assert not mixer["w_q"] and not mixer["memory"]["memory"]["w_in"]
  assert not same["blocks"]["cms"]["high"]["w_up"]


@pytest.mark.parametrize("name", optimizer.RULES)
def test_slots_of_every_rule_are_sharded(name):
  mesh = sharding.mesh(fsdp=4, tensor=2)
  tx = make(MODEL, name=name).tx
  like = state_lib.abstract(MODEL, tx, mesh)
  assert not [
    sharding.path_name(path)
    for path, x in jax.tree_util.tree_leaves_with_path(like["opt"])
    if x.size > 2**11 and x.sharding.is_fully_replicated
  ]


def test_rows_of_the_card():
  rows = make(stub.Model((0, 4 * TOKENS))).rows
  assert [row.chunk for row in rows] == [card.STEP, card.STEP, 4 * TOKENS]
  assert {row.kind for row in rows} == {"optimizer state"}
  assert "adamw" in card.format_rows(rows, TOKENS)
  rows = make(stub.Model(), name="m3", options={"slow_every": 10}).rows
  assert [row.chunk for row in rows] == [card.STEP, 10 * TOKENS]
