"""The outer optimizer: decay by path, periods, schedule, options."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nl_jax import card, sharding
from nl_jax.levels import STEP
from nl_jax.memory import self_modifying
from nl_jax.models import cms, lm
from nl_jax.train import optimizer, rules, schedules
from nl_jax.train import state as state_lib
from tests.laws import models
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
    made.schedule,
    0.9,
    0.95,
    1e-8,
    weight_decay=0.1,
    mask=optimizer.decay_mask(model.leaves()),
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
    mask=optimizer.decay_mask(model.leaves()),
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


@pytest.mark.parametrize(
  ("name", "vector"),
  [("rwkv7", "mu_r"), ("ttt_linear", "token_rate"),
   ("gated_deltanet", "dt_bias")],
)  # fmt: skip
def test_a_stack_of_vectors_is_no_matrix(name, vector):
  # As many layers as a matrix has rows: its name alone does not give it away.
  net = dataclasses.replace(models.MODELS[name](), layers=2 * 16)
  params = jax.eval_shape(net.init, jax.random.key(0))
  decays = optimizer.decay_mask(net.leaves())(params)
  specs = optimizer.matrices(net.leaves())(params)
  assert vector in params["blocks"]["mixer"]
  for path, x in jax.tree_util.tree_leaves_with_path(params["blocks"]):
    if x.ndim < 3:
      at = lambda tree, path=path: functools.reduce(
        lambda node, key: node[key.key], path, tree["blocks"]
      )
      assert not at(decays), path
      assert at(specs) is None, path
  assert decays["blocks"]["mixer"]["w_o"]
  assert specs["blocks"]["mixer"]["w_o"] is not None


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


def rates(name, *, steps=24, peak=2.0, warmup=4, cooldown=0):
  made = schedules.make(
    name, peak=peak, warmup_steps=warmup, steps=steps, min_ratio=0.1,
    cooldown_steps=cooldown,
  )  # fmt: skip
  return np.array([float(made(i)) for i in range(steps)])


@pytest.mark.parametrize("name", schedules.NAMES)
def test_every_schedule_warms_up_and_ends_where_it_says(name):
  cooldown = 5 if name in ("wsd", "inverse_root") else 0
  got = rates(name, cooldown=cooldown)
  np.testing.assert_allclose(got[:4], [0.5, 1, 1.5, 2], rtol=1e-6)
  assert got[-1] == pytest.approx(2.0 if name == "constant" else 0.2)
  assert all(a >= b for a, b in zip(got[4:], got[5:]))


def test_schedules_are_the_formulas_of_their_page():
  np.testing.assert_allclose(rates("constant")[4:], 2, rtol=1e-6)
  line = 2 - 1.8 * np.arange(20) / 19
  np.testing.assert_allclose(rates("linear")[4:], line, rtol=1e-5)
  root = 2 * np.sqrt(4 / np.arange(5, 25))
  np.testing.assert_allclose(rates("inverse_root")[4:], root, rtol=1e-5)
  wsd = rates("wsd", cooldown=3)
  np.testing.assert_allclose(wsd[4:], [*[2] * 17, 1.4, 0.8, 0.2], rtol=1e-5)
  # A cooldown begins where the root stands.
  cooled = rates("inverse_root", cooldown=2)[-3:]
  half = (2 * np.sqrt(4 / 23) + 0.2) / 2
  np.testing.assert_allclose(cooled, [root[-3], half, 0.2], rtol=1e-5)


@pytest.mark.parametrize(("name", "cooldown", "text"), [
  ("cosin", 0, "optim.schedule must be one of cosine"),
  ("cosine", 3, "'cosine' has no cooldown"),
  ("constant", 3, "use wsd or inverse_root"),
  ("wsd", 0, "needs optim.cooldown_steps"),
  ("wsd", -1, "must be at least 0"),
  ("wsd", 21, "at most train.steps, got 4 [+] 21 > 24"),
])  # fmt: skip
def test_schedules_that_their_steps_do_not_fit(name, cooldown, text):
  with pytest.raises(ValueError, match=text):
    rates(name, cooldown=cooldown)


def test_a_slow_level_keeps_its_rate_when_the_batch_changes():
  model = stub.Model((2 * TOKENS, 4 * TOKENS))
  params = model.init(jax.random.key(0))
  zero = jax.tree.map(jnp.zeros_like, params)
  common = dict(weight_decay=0.5, schedule="linear", steps=20)
  one, half = make(model, **common), make(
    model, tokens_per_step=TOKENS // 2, **common
  )  # fmt: skip
  state = one.tx.init(params)
  for _ in range(5):  # Within the third period of high.
    _, state = one.tx.update(zero, state, params)
  half.clocks.update(optimizer.clocks_of(state, 5))
  assert half.clocks["cms/high"] == (4, 2) and half.clocks["slow"] == (5, 5)
  moved = []
  for _ in range(2):  # The other half of the period.
    updates, state = half.tx.update(zero, state, params)
    moved.append(level(updates, "high"))
  assert not moved[0].any()
  rate = 0.5 * float(one.schedule(4))
  np.testing.assert_allclose(moved[1], -rate * level(params, "high"), rtol=1e-5)
  # What does not wait is at the rate of its step.
  rate = 0.5 * float(one.schedule(6))
  np.testing.assert_allclose(updates["embed"], -rate * params["embed"], 1e-5)


LEVELS = (TOKENS, 2 * TOKENS, 4 * TOKENS)


def test_groups_have_rates_and_decays_of_their_own_or_rest():
  model = stub.Model(LEVELS)
  params = model.init(jax.random.key(0))
  plain = run(make(model).tx, params, 4)[-1]
  made = make(model, groups=(
    "embed:frozen", "cms/mid/w_up:rate=0.5", "cms/mid:rate=0.5,decay=0",
  ))  # fmt: skip
  assert made.groups[0] == "embed:frozen: 1 arrays, 128 parameters"
  assert made.groups[2] == "cms/mid:rate=0.5,decay=0: 2 arrays, 128 parameters"
  seen = run(made.tx, params, 4)
  last = seen[-1]
  np.testing.assert_array_equal(last["embed"], params["embed"])
  for name in ("high", "low"):
    jax.tree.map(
      np.testing.assert_array_equal, last["blocks"]["cms"][name],
      plain["blocks"]["cms"][name],
    )  # fmt: skip
  # The period of the level stays: the second update is the fourth step's.
  mid = lambda tree, name: tree["blocks"]["cms"]["mid"][name]
  assert (mid(seen[1], "w_up") == mid(params, "w_up")).all()
  moved = mid(seen[2], "w_up") - mid(params, "w_up")
  whole = mid(run(make(model).tx, params, 2)[-1], "w_up") - mid(params, "w_up")
  np.testing.assert_allclose(moved, whole / 2, rtol=1e-4, atol=1e-6)
  bare = run(make(model, weight_decay=0.0).tx, params, 2)[-1]
  moved = mid(seen[2], "w_down") - mid(params, "w_down")
  whole = mid(bare, "w_down") - mid(params, "w_down")
  np.testing.assert_allclose(moved, whole / 2, rtol=1e-4, atol=1e-6)


def test_only_the_levels_learn_and_frozen_gradients_count_for_no_norm():
  model = stub.Model(LEVELS)
  params = model.init(jax.random.key(0))
  tx = make(model, groups=("!blocks/cms:frozen",), clip_norm=1.0).tx
  last = run(tx, params, 4)[-1]
  np.testing.assert_array_equal(last["embed"], params["embed"])
  assert (level(last, "low") != level(params, "low")).any()
  state = tx.init(params)
  assert not any(  # No state for what rests.
    x.shape == params["embed"].shape for x in jax.tree.leaves(state)
  )
  grads = gradients(params, 0)
  large = {**grads, "embed": 1e6 * grads["embed"]}
  one, _ = tx.update(grads, state, params)
  two, _ = tx.update(large, state, params)
  jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize(("groups", "text"), [
  (("heads:frozen",), "'heads:frozen' holds no parameter"),
  (("cms:frozen", "mid:rate=2"), "'mid:rate=2' holds no parameter"),
  (("embed",), "must be pattern:frozen"),
  ((":frozen",), "a pattern and what holds"),
  (("(:frozen",), "must be pattern:frozen"),
  (("embed:rate=fast",), "could not convert"),
  (("embed:rate=-1",), "must be at least 0 and finite"),
  (("embed:speed=1",), "is none of frozen, rate="),
  (("embed:frozen,rate=1",), "'frozen' is none of"),
  ((".:frozen",), "freeze every parameter"),
])  # fmt: skip
def test_groups_that_do_not_fit(groups, text):
  with pytest.raises(ValueError, match=text):
    make(stub.Model(LEVELS), groups=groups)


def test_levels_that_restart_are_in_no_group():
  model = stub.Model(LEVELS, "nested")
  make(model, groups=("embed:frozen",))
  with pytest.raises(ValueError, match="variant='nested'"):
    make(model, groups=("cms/high:rate=2",))


def test_schedule_warms_up_and_falls_to_a_tenth():
  rate = schedules.make(
    "cosine", peak=2.0, warmup_steps=4, steps=24, min_ratio=0.1
  )
  got = [float(rate(i)) for i in range(24)]
  np.testing.assert_allclose(got[:5], [0.5, 1, 1.5, 2, 2], rtol=1e-6)
  assert got[-1] == pytest.approx(0.2)
  assert all(a >= b for a, b in zip(got[4:], got[5:]))
  middle = 2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 5 / 19)))
  assert got[9] == pytest.approx(middle, rel=1e-5)
  assert float(rate(30)) == pytest.approx(0.2)
  assert rates("cosine", steps=1, peak=1.0, warmup=0) == pytest.approx(1)


@pytest.mark.parametrize(
  ("change", "text"),
  [
    ({"name": "sdg"}, "optim.name must be one of .*adamw"),
    ({"learning_rate": -1.0}, "optim.learning_rate"),
    ({"weight_decay": float("nan")}, "optim.weight_decay"),
    ({"min_ratio": 2.0}, "from 0 to 1"),
    ({"steps": 0}, "train.steps"),
    ({"options": {"alpha": 0.9}}, "adamw has no field alpha; it has b1, b2"),
    ({"name": "m3", "options": {"mask": 1}}, "m3 has no field mask; it has b1"),
    ({"name": "muon", "options": {"alpha": 1}}, "no field alpha"),
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
  cms=cms.Options(("high", "low"), (32, 32), (TOKENS, 2 * TOKENS)),
  mixer=self_modifying.Options(),
)


@pytest.fixture(scope="module")
def params():
  return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.mark.parametrize("name", rules.RULES)
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
  said = make(MODEL, name="muon").chosen(params)
  assert re.match(r"optimizer: muon for [\d,]+ parameters in matrices \(", said)
  assert "adamw for blocks/cms" in said and "embed" in said
  assert "w_q" not in said and "w_up" not in said
  assert make(MODEL).chosen(params) == "optimizer: adamw for all parameters"


@pytest.mark.parametrize("name", rules.RULES)
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
  assert [row.chunk for row in rows] == [STEP, STEP, 4 * TOKENS]
  assert {row.kind for row in rows} == {"optimizer state"}
  assert "adamw" in card.format_rows(rows, TOKENS)
  rows = make(stub.Model(), name="m3", options={"slow_every": 10}).rows
  assert [row.chunk for row in rows] == [STEP, 10 * TOKENS]
