"""Samba: pairs of layers as one stack, its state, size and place on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import named
from nl_jax import build, card, sharding
from nl_jax.models import cms, layers, lm
from nl_jax.models.mixers import mamba, samba
from nl_jax.models.mixers.attention import mixer as attention
from nl_jax.train import optimizer
from tests.laws.models import MODELS


def small(depth=4, **options):
  return lm.LanguageModel(
    "samba", width=8, layers=depth, heads=2, head_dim=4, vocab_size=16,
    sequence_length=16, cms=cms.Options(widths=(12,)),
    mixer=samba.Options(**{"window": 4, "chunk": 4} | options),
  )  # fmt: skip


@functools.cache
def forward(model):
  """The compiled `apply`, which tests share."""
  return jax.jit(model.apply)


def generic(model, seed=0, scale=0.3):
  """Float64 parameters, none of them at a special value."""
  rng = np.random.default_rng(seed)
  move = lambda x: np.asarray(x, float) + scale * rng.standard_normal(x.shape)
  params = model.init(jax.random.key(seed))
  return jax.tree.map(lambda x: jnp.asarray(move(x)), params)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def close(x, y, tolerance):
  y = np.asarray(y)
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def layer_loop(model, params, tokens):
  """Logits, one layer after the other: Mamba where the index is even."""
  x = params["embed"][tokens]
  norm = lambda x, scale: layers.rms_norm(x, scale)
  window = lm.LanguageModel(
    "transformer", model.width, 1, model.heads, model.head_dim, 16, 16,
    model.cms, attention.Options(window=model.mixer.window),
  )  # fmt: skip
  for i in range(model.layers):
    pair = jax.tree.map(lambda p, j=i // 2: p[j], params["blocks"])
    inner = pair["mixer"]
    if i % 2 == 0:
      y = norm(x, pair["mixer_norm"]["scale"])
      y, _ = mamba.apply(inner["mamba"], y, None, None, chunk=3)
      feed_forward = inner["cms"]
    else:
      y = norm(x, inner["attention_norm"]["scale"])
      y, _, _ = attention.apply(inner["attention"], y, None, None, model=window)
      feed_forward = pair["cms"]
    x, f = x + y, feed_forward["ffn"]
    y = norm(x, f["norm"]["scale"])
    x = x + (jax.nn.silu(y @ f["w_gate"]) * (y @ f["w_up"])) @ f["w_down"]
  return norm(x, params["final_norm"]["scale"]) @ params["embed"].T


def test_a_stack_of_pairs_is_a_loop_over_layers():
  model = small()
  with jax.enable_x64(True):
    params = generic(model)
    tokens = np.random.default_rng(0).integers(0, 16, (1, 11))
    logits, _, metrics = forward(model)(params, tokens)
    loop = jax.jit(lambda p: layer_loop(model, p, tokens))
    close(logits, loop(params), 1e-10)
  assert metrics == {}
  assert all(x.shape[0] == 2 for x in jax.tree.leaves(params["blocks"]))


def test_attention_sees_a_window_and_mamba_the_rest():
  """With Mamba's and the feed-forward's outputs off, only a window reaches."""
  model = small()
  with jax.enable_x64(True):
    params = generic(model)
    tokens = np.random.default_rng(0).integers(0, 16, (1, 11))
    moved = tokens.copy()
    moved[0, 0] = (moved[0, 0] + 1) % 16
    run = forward(model)
    reach = lambda p: np.asarray(run(p, tokens)[0] != run(p, moved)[0])[0]
    assert reach(params).any(axis=-1).all()
    params["blocks"]["mixer"]["mamba"]["w_o"] *= 0
    changed = reach(params).any(axis=-1)
    assert changed[:7].all() and not changed[7:].any()  # Twice 3 tokens on.


def test_the_state_has_one_size_and_the_card_says_it():
  model = MODELS["samba"]()
  params = jax.eval_shape(model.init, jax.random.key(0))

  def size(length):
    start = lambda p: model.init_state(p, 1, length).layers
    leaves = jax.tree.leaves(jax.eval_shape(start, params))
    return sum(x.size * x.dtype.itemsize for x in leaves)

  assert not model.grows
  rows, labels = model.levels()
  assert [row.name for row in rows[:2]] == ["Mamba", "attention to 16"]
  assert size(1) == size(4096) == sum(row.state_bytes for row in rows)
  assert rows[0].state_bytes == 128 * (16 + 3) * 4 + 3 * 4
  assert sum(row.parameters for row in rows) == model.parameter_count()
  assert [row.level for row in card.rank(rows)][:2] == [2, 1]
  assert set(jax.tree.leaves(labels(params))) == {"slow"}


@pytest.mark.parametrize("size,total", [
  ("340m", 337.7), ("760m", 759.0), ("1b3", 1301.5),
])  # fmt: skip
def test_sizes_are_the_formula_and_the_table(size, total):
  """docs/mathematics.md 7.2, in millions."""
  config = build.resolve(named.load_config(f"samba_{size}"))
  net = build.model(config)
  assert abs(net.parameter_count() / 1e6 - total) < 0.06
  assert net.units == 12 and net.mixer.window == 2048
  D, F, R = net.width, net.cms.widths[0], net.width // 16
  pair = 6 * D * D + 2 * D * (2 * R + 3 * 16 + 7) + 4 * D * D + 6 * D * F
  blocks = 12 * (pair + 4 * D)
  assert net.parameter_count() == 32_000 * D + blocks + D


def test_every_parameter_and_state_has_a_place_on_the_mesh():
  model = MODELS["samba"]()
  mesh = sharding.mesh(fsdp=-1, tensor=2)
  params = jax.eval_shape(model.init, jax.random.key(0))
  state = jax.eval_shape(lambda p: model.init_state(p, 4, 8), params)
  places = sharding.param_shardings(params, model.axes(), mesh)["blocks"][
    "mixer"
  ]
  assert places["mamba"]["w_x"].spec[1:] == ("fsdp", "tensor")
  assert places["mamba"]["A_log"].spec[1:] == ("tensor", None)
  assert places["attention"]["w_o"].spec[1:] == ("tensor", "fsdp")
  assert places["cms"]["ffn"]["w_down"].spec[1:] == ("tensor", "fsdp")
  made = sharding.sequence_shardings(state, mesh).layers
  assert made.mamba.h_BxIxN.spec[2] == "tensor"
  assert made.attention.keys_BxSxHxK.spec[3] == "tensor"


def test_eight_devices_are_one():
  """Logits on a mesh of 4 by 2 and on one device."""
  model = small(depth=2)
  params = model.init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 16, (4, 8))
  run = lambda p, tokens: model.apply(p, tokens)[0]
  alone = jax.jit(run)(params, tokens)
  mesh = sharding.mesh(fsdp=4, tensor=2)
  params = jax.device_put(
    params, sharding.param_shardings(params, model.axes(), mesh)
  )
  rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    many = jax.jit(run)(params, rows)
  np.testing.assert_allclose(many, alone, atol=1e-6)


def test_decay_is_for_matrices():
  model = MODELS["samba"]()
  params = jax.eval_shape(model.init, jax.random.key(0))
  mixer = optimizer.decay_mask(model.leaves())(params)["blocks"]["mixer"]
  decays = {name for name, decay in mixer["mamba"].items() if decay}
  assert decays == {"w_x", "w_z", "w_dbc", "w_dt", "w_o"}
  assert not mixer["attention_norm"]["scale"]
  assert mixer["cms"]["ffn"]["w_up"] and mixer["attention"]["w_q"]


@pytest.mark.parametrize("change,message", [
  (dict(layers=3), "model.layers must be even for model.arch='samba'"),
  (dict(heads=3), "heads \\* model.head_dim"),
  (dict(cms=cms.Options(("a", "b"), (8, 8), (1, 2))), "one feed-forward"),
  (dict(mixer=None), "model.mixer belongs to model.arch="),
])  # fmt: skip
def test_shapes_that_cannot_be_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(small(), **change)


@pytest.mark.parametrize("name,value", [
  ("window", 1), ("state_dim", 0), ("chunk", 0), ("chunk", 2.5),
])  # fmt: skip
def test_switches_that_cannot_be_are_refused(name, value):
  with pytest.raises(ValueError, match=f"model.mixer.{name} must be a whole"):
    samba.Options(**{name: value})


def test_the_walk_is_one_that_there_is():
  with pytest.raises(ValueError, match="model.mixer.walk must be one of auto"):
    samba.Options(walk="reference")
