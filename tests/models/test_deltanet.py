"""DeltaNet and Gated DeltaNet against a token loop and other code bases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import named
from nl_jax import build, memory, sharding
from nl_jax.memory import linear
from nl_jax.models import cms, lm
from nl_jax.models import leaves as leaf
from nl_jax.models.mixers import deltanet
from tests.golden import _oracle
from tests.laws.models import MODELS

NAMES = ("deltanet", "gated_deltanet")


def small(arch, width=12, heads=2, head_dim=6, **options):
  return lm.LanguageModel(
    arch, width=width, layers=1, heads=heads, head_dim=head_dim,
    vocab_size=16, sequence_length=16, cms=cms.Options(widths=(8,)),
    mixer=deltanet.Options(**{"chunk": 4} | options),
  )  # fmt: skip


def generic(model, seed=0, scale=0.3):
  """Float64 parameters of one layer, none of them at a special value."""
  params = leaf.drawn(deltanet.leaves(model), jax.random.key(seed))
  rng = np.random.default_rng(seed)
  move = lambda x: np.asarray(x, float) + scale * rng.standard_normal(x.shape)
  return jax.tree.map(lambda x: jnp.asarray(move(x)), params)


def mix(model, params, x, ids=None):
  run = lambda p, x, ids: deltanet.apply(p, x, None, ids, model=model)[0]
  return jax.jit(run)(params, x, ids)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def close(x, y, tolerance):
  y = np.asarray(y)
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def token_loop(model, params, x_TxD):
  """A layer by its definition (docs/mathematics.md 6), by token and head."""
  p = jax.tree.map(np.asarray, params)
  gated = model.arch == "gated_deltanet"
  H, K = model.heads, model.head_dim
  silu = lambda z: z * sigmoid(z)
  norm = lambda z: z / np.sqrt(z @ z + 1e-6)
  z = {n: x_TxD @ p[f"w_{n}"] for n in "qkv"}
  S = [np.zeros((K, p["w_v"].shape[1] // H)) for _ in range(H)]
  out = np.zeros_like(x_TxD)
  for t, x in enumerate(x_TxD):
    conv = {}
    for n in "qkv":
      taps = [p[f"conv_{n}"][3 - j] * z[n][t - j] for j in range(4) if j <= t]
      conv[n] = silu(sum(taps)).reshape(H, -1)
    heads = []
    for h in range(H):
      q, k, v = norm(conv["q"][h]), norm(conv["k"][h]), conv["v"][h]
      beta = sigmoid(x @ p["w_beta"][:, h])
      beta *= 2 if model.mixer.allow_neg_eigval else 1
      if gated:
        step = np.log1p(np.exp(x @ p["w_a"][:, h] + p["dt_bias"][h]))
        S[h] = np.exp(-np.exp(p["A_log"][h]) * step) * S[h]
      S[h] = S[h] + beta * np.outer(k, v - k @ S[h])
      y = q @ S[h] / np.sqrt(K)
      heads.append(y / np.sqrt((y * y).mean() + 1e-6) * p["norm"]["scale"])
    y = np.concatenate(heads)
    if model.mixer.output_gate:
      y = y * silu(x @ p["w_g"])
    out[t] = y @ p["w_o"]
  return out


@pytest.mark.parametrize("arch,options", [
  ("deltanet", {}),
  ("deltanet", dict(allow_neg_eigval=True, output_gate=True)),
  ("gated_deltanet", dict(value_dim=4, output_gate=True)),
  ("gated_deltanet", dict(chunk=1)),
])  # fmt: skip
def test_a_layer_is_its_token_loop(arch, options):
  model = small(arch, **options)
  with jax.enable_x64(True):
    params, x = generic(model), draw(2, 11, model.width)
    y = mix(model, params, x)
    for b in range(2):
      close(y[b], token_loop(model, params, np.asarray(x[b])), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_chunk_is_no_part_of_the_function(name):
  with jax.enable_x64(True):
    x, ys = draw(1, 20, 12), []
    for chunk in (1, 4, 32):
      model = small(name, chunk=chunk)
      params = generic(model)
      ys.append(mix(model, params, x))
    for y in ys[1:]:
      close(y, ys[0], 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_documents_begin_anywhere(name):
  """Alignment 1: in the middle of a chunk, also of a first call."""
  model = small(name)
  assert model.alignment == 1
  with jax.enable_x64(True):
    params, x = generic(model), draw(1, 13, model.width)
    ids = jnp.asarray([[1] * 5 + [2] * 2 + [0] + [3] * 5], jnp.int32)
    y = mix(model, params, x, ids)
    for a, b in ((0, 5), (5, 7), (8, 13)):
      close(y[:, a:b], mix(model, params, x[:, a:b]), 1e-10)


def test_without_decay_gated_deltanet_is_deltanet():
  gated, plain = small("gated_deltanet"), small("deltanet")
  with jax.enable_x64(True):
    params, x = generic(gated), draw(2, 9, 12)
    params["A_log"] = jnp.full_like(params["A_log"], -1e3)
    y = mix(gated, params, x)
    for name in ("A_log", "dt_bias", "w_a"):
      params.pop(name)
    close(y, mix(plain, params, x), 1e-12)


def test_negative_eigenvalues_turn_the_sign_of_what_is_held():
  """beta = 2 reflects: S + 2 k^T (0 - k S) (docs/mathematics.md 2.8)."""
  rule = deltanet.Options(chunk=4).rule
  start = {"w": jnp.zeros((1, 2, 1))}
  k = jnp.tile(jnp.asarray([1.0, 0.0]), (1, 4, 1, 1))
  v = jnp.asarray([1.0, 0, 0, 0]).reshape(1, 4, 1, 1)
  beta = jnp.asarray([1.0, 2, 2, 2]).reshape(1, 4, 1)
  y, _, _ = linear.update(
    start, memory.chunked.start(start, 1, rule), k, k, v,
    memory.Gates(beta, 0 * beta), rule=rule,
  )  # fmt: skip
  np.testing.assert_allclose(y.ravel(), [1, -1, 1, -1], atol=1e-6)


@pytest.mark.parametrize("name", ["delta_rule", "gated_rule"])
def test_the_rule_is_that_of_flash_linear_attention(name):
  frozen = _oracle.load("delta_rule")
  saved = {k: v for k, v in frozen.items() if k.startswith(f"{name}/")}
  leaf = lambda n: jnp.asarray(saved[f"{name}/{n}"])
  names = [n for n in ("q", "k", "v", "beta", "g") if f"{name}/{n}" in saved]
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  rule = deltanet.Options(chunk=4).rule

  def run(x):
    q, k = unit(x["q"]) * x["q"].shape[-1] ** -0.5, unit(x["k"])
    beta = jax.nn.sigmoid(x["beta"])
    decay = jax.nn.log_sigmoid(x["g"]) if "g" in x else 0 * beta
    start = {"w": jnp.zeros((2, 4, 6))}
    y, state, _ = linear.update(
      start, memory.chunked.start(start, 2, rule), q, k, x["v"],
      memory.Gates(beta, decay), rule=rule,
    )  # fmt: skip
    return (y * leaf("cotangent")).sum(), (y, state.w["w"])

  inputs = {n: leaf(n) for n in names}
  run = jax.jit(jax.value_and_grad(run, has_aux=True))
  (_, (y, state)), grads = run(inputs)
  close(y, leaf("y"), 1e-5)
  close(state, leaf("state"), 1e-5)
  for n in names:
    close(grads[n], leaf(f"grad/{n}"), 1e-4)


def test_the_layer_is_that_of_qwen3_next():
  """Ours in float64: the float32 sums of theirs are off by up to 1.4e-4."""
  frozen = _oracle.load("delta_rule")
  names = [k.removeprefix("layer/grad/") for k in frozen if "layer/grad/" in k]
  model = small("gated_deltanet", head_dim=4, value_dim=6, output_gate=True)

  def run(tree):
    params = {n: w for n, w in tree.items() if n not in ("x", "norm/scale")}
    params["norm"] = {"scale": tree["norm/scale"]}
    y, _, _ = deltanet.apply(params, tree["x"], None, None, model=model)
    return (y * frozen["layer/cotangent"]).sum(), y

  with jax.enable_x64(True):
    tree = {n: jnp.asarray(frozen[f"layer/{n}"].astype(float)) for n in names}
    (_, y), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(tree)
  close(y, frozen["layer/y"], 1e-5)
  for n in names:
    close(grads[n], frozen[f"layer/grad/{n}"], 2e-4)


def test_the_frozen_numbers_are_what_the_oracles_say():
  for package in ("torch", "transformers"):
    pytest.importorskip(package)
  script = pytest.importorskip("tests.golden.delta_rule")
  frozen = _oracle.load("delta_rule")
  for name, array in script.make().items():
    close(array, frozen[name], 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_the_formulas_and_the_table(name):
  """docs/mathematics.md 7.2, in millions."""
  table = dict(
    deltanet=(341.6, 757.9, 1300.1), gated_deltanet=(340.1, 758.1, 1303.7)
  )
  for size, total in zip(("340m", "760m", "1b3"), table[name]):
    config = build.resolve(named.load_config(f"{name}_{size}"))
    net = build.model(config)
    assert abs(net.parameter_count() / 1e6 - total) < 0.06
    D, H, K = net.width, net.heads, net.head_dim
    mixer = leaf.count(deltanet.leaves(net))
    if name == "deltanet":
      assert mixer == 4 * D * D + D * H + 12 * D + K
    else:
      assert abs(mixer / (6 * D * D) - 1) < 0.01
      assert 4 * H * K == 3 * D and net.mixer.value_dim == 2 * K


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_and_state_has_a_place_on_the_mesh(name):
  model = MODELS[name]()
  mesh = sharding.mesh(fsdp=-1, tensor=2)
  params = jax.eval_shape(model.init, jax.random.key(0))
  state = jax.eval_shape(lambda p: model.init_state(p, 4, 8), params)
  places = sharding.param_shardings(params, model.axes(), mesh)["blocks"][
    "mixer"
  ]
  assert places["w_beta"].spec[1:] == ("fsdp", "tensor")
  fast = sharding.sequence_shardings(state, mesh).layers.memory.w["w"]
  assert fast.spec[2] == "tensor"


@pytest.mark.parametrize("change,message", [
  (dict(value_dim=-1), "model.mixer.value_dim must be a whole number from 0"),
  (dict(chunk=0), "model.mixer.chunk must be a whole number"),
])  # fmt: skip
def test_switches_that_cannot_be_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    deltanet.Options(**change)


def test_what_a_model_does_not_have_is_named():
  with pytest.raises(ValueError, match="has no model.mixer.momentum; it has"):
    lm.options("deltanet", {"momentum": "ema"})
  with pytest.raises(ValueError, match="Did you mean 'output_gate'"):
    lm.options("gated_deltanet", {"output_gat": True})
  with pytest.raises(ValueError, match="Did you mean 'deltanet'"):
    lm.options("deltanets", {})
  with pytest.raises(ValueError, match="model.mixer belongs to model.arch="):
    dataclasses.replace(MODELS["deltanet"](), mixer=None)
  with pytest.raises(ValueError, match="heads \\* model.head_dim"):
    dataclasses.replace(MODELS["deltanet"](), heads=3)
