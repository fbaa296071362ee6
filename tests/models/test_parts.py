"""Layers, attention and CMS against loops and the things they generalise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax.models import cms, layers, lm
from nl_jax.models import leaves as leaf
from nl_jax.models.mixers.attention import mixer as attention
from nl_jax.models.mixers.attention import softmax
from tests.laws.models import MODELS


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def test_rms_norm_is_its_formula():
  with jax.enable_x64(True):
    x, scale = draw(3, 8), draw(8, seed=1)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale[None]
    np.testing.assert_allclose(layers.rms_norm(x, scale), expected, rtol=1e-12)


def test_rope_turns_pairs_by_relative_position():
  with jax.enable_x64(True):
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)
    at = lambda x, p: layers.rope(x, jnp.full((1, 1), p))
    dot = lambda p, s: float((at(q, p) * at(k, s)).sum())
    np.testing.assert_allclose(dot(7, 3), dot(24, 20), rtol=1e-10)
    np.testing.assert_allclose(dot(5, 5), float((q * k).sum()), rtol=1e-10)
    assert abs(dot(7, 3) - dot(7, 4)) > 1e-3


def test_convolution_is_a_loop_over_taps():
  with jax.enable_x64(True):
    w, x = draw(4, 3), draw(2, 9, 3, seed=1)
    y, state = layers.conv_apply(w, x)
    padded = np.pad(x, [(0, 0), (3, 0), (0, 0)])
    for t in range(9):
      expected = sum(w[j][None] * padded[:, t + j] for j in range(4))
      np.testing.assert_allclose(y[:, t], expected, atol=1e-12)
    np.testing.assert_array_equal(state.inputs_Bx3xE, x[:, -3:])


def test_convolution_stops_at_documents_and_streams():
  with jax.enable_x64(True):
    w, x = draw(4, 3), draw(1, 9, 3, seed=1)
    ids = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2]], jnp.int32)
    y, _ = layers.conv_apply(w, x, None, ids)
    alone, _ = layers.conv_apply(w, x[:, 4:])
    np.testing.assert_allclose(y[:, 4:], alone, atol=1e-12)
    state, parts = layers.conv_state(1, 3, x.dtype), []
    for a, b in ((0, 2), (2, 3), (3, 5), (5, 9)):
      part, state = layers.conv_apply(w, x[:, a:b], state, ids[:, a:b])
      parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, 1), y, atol=1e-12)


def test_attention_is_softmax_over_the_past():
  model = MODELS["transformer"]()
  with jax.enable_x64(True):
    params = leaf.drawn(attention.leaves(model), jax.random.key(0))
    params = jax.tree.map(lambda p: 5 * p.astype(float), params)
    x = draw(1, 6, model.width)
    y, _, _ = attention.apply(params, x, None, None, model=model)
    heads = (1, 6, model.heads, model.head_dim)
    q, k, v = ((x @ params[n]).reshape(heads) for n in ("w_q", "w_k", "w_v"))
    positions = jnp.arange(6)[None]
    q, k = layers.rope(q, positions), layers.rope(k, positions)
    out = np.zeros(heads)
    for t in range(6):
      for h in range(model.heads):
        logits = np.asarray(k[0, : t + 1, h] @ q[0, t, h])
        p = np.exp(logits / np.sqrt(model.head_dim))
        out[0, t, h] = (p / p.sum()) @ np.asarray(v[0, : t + 1, h])
    expected = out.reshape(1, 6, -1) @ params["w_o"]
  np.testing.assert_allclose(y, expected, atol=1e-10)


def test_float32_attention_is_the_librarys():
  q, k, v = (draw(1, 6, 2, 8, seed=i) for i in range(3))
  short = softmax.attention(*(x.astype(jnp.float32) for x in (q, k, v)), None)
  with jax.enable_x64(True):
    wide = softmax.attention(
      *(jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v)), None
    )
  np.testing.assert_allclose(short, wide, atol=1e-6)


LEVELS = cms.Options(("fast", "slow"), (12, 20), (1, 4))


def test_sequential_levels_are_a_chain_of_swiglu_blocks():
  params = leaf.drawn(cms.leaves(LEVELS, 8, 2), jax.random.key(0))
  x = expected = draw(2, 3, 8).astype(jnp.float32)
  for name in ("fast", "slow"):
    p = params[name]
    normed = layers.rms_norm(expected, p["norm"]["scale"])
    gate = jax.nn.silu(normed @ p["w_gate"])
    expected = expected + (gate * (normed @ p["w_up"])) @ p["w_down"]
  np.testing.assert_allclose(cms.apply(params, x, LEVELS), expected, atol=1e-6)
  nested = dataclasses.replace(LEVELS, variant="nested")
  np.testing.assert_array_equal(
    cms.apply(params, x, nested), cms.apply(params, x, LEVELS)
  )


def test_independent_levels_are_a_weighted_sum():
  config = dataclasses.replace(LEVELS, variant="independent")
  params = leaf.drawn(cms.leaves(config, 8, 2), jax.random.key(0))
  np.testing.assert_allclose(params["mix"], 2**-0.5)
  x = draw(2, 3, 8).astype(jnp.float32)
  alone = [
    cms.apply({n: params[n]}, x, cms.Options((n,), (f,), (0,))) - x
    for n, f in (("fast", 12), ("slow", 20))
  ]
  expected = x + 2**-0.5 * (alone[0] + alone[1])
  np.testing.assert_allclose(cms.apply(params, x, config), expected, atol=1e-6)


def test_hope_attention_with_one_level_is_transformer():
  plain = MODELS["transformer"]()
  hope = dataclasses.replace(plain, arch="hope_attention")
  params = plain.init(jax.random.key(0))
  tokens = jnp.arange(24).reshape(2, 12)
  np.testing.assert_array_equal(
    plain.apply(params, tokens)[0], hope.apply(params, tokens)[0]
  )


def test_a_layer_that_is_run_again_runs_its_kernel_once():
  model = MODELS["hope_linear"]()
  mixer = dataclasses.replace(model.mixer, walk="pallas_interpret")
  model = dataclasses.replace(model, mixer=mixer, remat="layer")
  params = jax.eval_shape(model.init, jax.random.key(0))
  loss = lambda params: model.apply(params, jnp.zeros((2, 16), int))[0].sum()
  text = str(jax.make_jaxpr(jax.grad(loss))(params))
  kernels = [text.count(f"name=smt_linear_{way}") for way in ("fwd", "bwd")]
  assert kernels == [1, 1]


@pytest.mark.parametrize("name", ["transformer", "hope"])
def test_remat_and_scan_change_nothing(name):
  model = MODELS[name]()
  params = model.init(jax.random.key(0))
  tokens = jnp.arange(24).reshape(2, 12)

  def loss(params, model):
    return jnp.sin(model.apply(params, tokens)[0]).sum()

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  kept = grad(params, dataclasses.replace(model, remat="none"))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
    grad(params, model), kept,
  )  # fmt: skip
  x = params["embed"][tokens]
  for i in range(model.layers):
    layer = jax.tree.map(lambda p: p[i], params["blocks"])  # noqa: B023
    x, _, _ = model.block(layer, None, x)
  x = layers.rms_norm(x, params["final_norm"]["scale"])
  logits, _, _ = model.apply(params, tokens)
  np.testing.assert_allclose(logits, x @ params["embed"].T, atol=2e-5)


@pytest.mark.parametrize("name", ["transformer", "hope"])
def test_bfloat16_activations_keep_float32_states(name):
  model = MODELS[name]()
  short = dataclasses.replace(model, dtype="bfloat16")
  params = model.init(jax.random.key(0))
  tokens = jnp.arange(32).reshape(2, 16)
  wide, _, _ = jax.jit(model.apply)(params, tokens)
  logits, state, _ = jax.jit(short.apply)(params, tokens)
  assert logits.dtype == jnp.float32
  scale = float(jnp.abs(wide).max())
  np.testing.assert_allclose(logits, wide, atol=0.05 * scale)
  if name == "hope":
    fast = jax.tree.leaves((state.layers.memory.memory.w,
                            state.layers.memory.generators.w))  # fmt: skip
    assert all(x.dtype == jnp.float32 for x in fast)


def test_labels_name_the_levels():
  model = MODELS["hope"]()
  labels = model.levels()[1](model.init(jax.random.key(0)))
  assert labels["blocks"]["cms"]["mid"]["w_up"] == "cms/mid"
  assert labels["blocks"]["mixer"]["w_q"] == "slow"
  plain = MODELS["transformer"]()
  names = plain.levels()[1](plain.init(jax.random.key(0)))
  assert set(jax.tree.leaves(names)) == {"slow"}


@pytest.mark.parametrize("change,message", [
  (dict(heads=3), "heads \\* model.head_dim must be model.width"),
  (dict(arch="hopes"), "Did you mean 'hope'"),
  (dict(layers=0), "layers must be a whole number"),
  (dict(dtype="float16"), "train.dtype must be one of"),
  (dict(mixer=None), "model.mixer belongs to"),
  (dict(arch="transformer", mixer=None), "one feed-forward level"),
])  # fmt: skip
def test_models_that_cannot_be_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(MODELS["hope"](), **change)


@pytest.mark.parametrize("change,message", [
  (dict(widths=(1,)), "one entry a level"),
  (dict(periods=(2, 3)), "each a multiple"),
  (dict(periods=(4, 2)), "from fast to slow"),
  (dict(variant="chain"), "cms.variant must be one of"),
  (dict(levels=("a", "a")), "must differ"),
])  # fmt: skip
def test_levels_that_cannot_be_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(LEVELS, **change)


def test_init_has_the_stated_spread():
  params = MODELS["hope"]().init(jax.random.key(0))
  std = lambda x: float(x.std())
  assert abs(std(params["embed"]) / 0.02 - 1) < 0.05
  assert abs(std(params["blocks"]["mixer"]["w_o"]) / 0.01 - 1) < 0.05
  assert abs(std(params["blocks"]["cms"]["low"]["w_down"]) / 0.01 - 1) < 0.05


def test_lm_state_is_a_tree_whose_leaves_have_a_batch_axis():
  for name in MODELS:
    model = MODELS[name]()
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda p, m=model: m.init_state(p, 3, 8), params)
    assert state.position_B.shape == (3,)
    if isinstance(model, lm.LanguageModel):
      for leaf in jax.tree.leaves(state.layers):
        assert leaf.shape[:2] == (model.units, 3)
    for leaf in jax.tree.leaves(state):
      assert 3 in leaf.shape[:2]


def test_without_jit_the_numbers_are_the_same():
  model = dataclasses.replace(MODELS["hope_linear"](), layers=1)
  params = model.init(jax.random.key(0))
  tokens = jnp.arange(9)[None]
  compiled, _, _ = jax.jit(model.apply)(params, tokens)
  with jax.disable_jit():
    plain, _, _ = model.apply(params, tokens)
  np.testing.assert_allclose(plain, compiled, atol=2e-5)
