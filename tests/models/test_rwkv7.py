"""RWKV-7 against its token loop, layer by layer, and flash-linear-attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import named as named_lib
from nl_jax import build, sharding
from nl_jax.kernels import general_delta_rule as ops
from nl_jax.models import cms, lm
from nl_jax.models.incontext import model as incontext
from nl_jax.models.mixers import rwkv7
from tests.golden import _oracle
from tests.laws.models import MODELS

RANKS = dict(decay_rank=3, rate_rank=3, value_rank=2, gate_rank=4)


def small(**change):
  return lm.LanguageModel(**dict(
    arch="rwkv7", width=12, layers=3, heads=2, head_dim=6, vocab_size=16,
    sequence_length=16, cms=cms.Options(widths=(8,)),
    mixer=rwkv7.Options(chunk=4, **RANKS),
  ) | change)  # fmt: skip


def generic(model, seed=0, scale=0.3):
  """Float64 parameters, none of them at a special value."""
  params = model.init(jax.random.key(seed))
  rng = np.random.default_rng(seed)
  move = lambda x: np.asarray(x, float) + scale * rng.standard_normal(x.shape)
  return jax.tree.map(lambda x: jnp.asarray(move(x)), params)


def close(x, y, tolerance):
  y = np.asarray(y)
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def rms(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def lora(p, name, x, inner=lambda z: z):
  bias = p.get(f"{name}_bias", 0)
  return inner(x @ p[f"{name}_down"]) @ p[f"{name}_up"] + bias


def time_mix(model, p, x_TxD, first_TxD):
  """One mixer from its definition, one token and head at a time."""
  H, K = model.heads, model.head_dim
  S, out, values = np.zeros((H, K, K)), np.zeros_like(x_TxD), []
  for t, now in enumerate(x_TxD):
    before = x_TxD[t - 1] if t else np.zeros_like(now)
    x = {n: now + (before - now) * p[f"mu_{n}"] for n in "rwkvag"}
    r, k, v = (x[n] @ p[f"w_{n}"] for n in "rkv")
    w = -np.exp(-0.5) * sigmoid(lora(p, "decay", x["w"], np.tanh))
    a = sigmoid(lora(p, "rate", x["a"]))
    g = lora(p, "gate", x["g"], sigmoid)
    if first_TxD is not None:
      v = v + (first_TxD[t] - v) * sigmoid(lora(p, "value", x["v"]))
    values.append(v)
    kappa = (k * p["key_scale"]).reshape(H, K)
    kappa /= np.sqrt((kappa * kappa).sum(-1, keepdims=True) + 1e-6)
    k = k * (1 + (a - 1) * p["key_rate"])
    r, k, v, w, a = (z.reshape(H, K) for z in (r, k, v, w, a))
    heads = []
    for h in range(H):
      erased = np.outer(kappa[h] * a[h], kappa[h] @ S[h])
      S[h] = np.exp(w[h])[:, None] * S[h] - erased + np.outer(k[h], v[h])
      y = r[h] @ S[h]
      heads.append((y - y.mean()) / np.sqrt(y.var() + 1e-5 * K))
    y = np.concatenate(heads) * p["norm"]["scale"] + p["norm"]["bias"]
    own = (r * k * p["bonus"].reshape(H, K)).sum(-1, keepdims=True) * v
    out[t] = ((y + own.reshape(-1)) * g) @ p["w_o"]
  return out, np.stack(values)


def token_loop(model, params, tokens):
  """Logits of one text, a layer after the other."""
  params = jax.tree.map(np.asarray, params)
  blocks, first = params["blocks"], None
  x = params["embed"][tokens]
  for i in range(model.layers):
    take = lambda path, z, i=i: z[i - ("value_" in jax.tree_util.keystr(path))]
    block = jax.tree_util.tree_map_with_path(take, blocks)
    y = rms(x, block["mixer_norm"]["scale"])
    y, values = time_mix(model, block["mixer"], y, first)
    first = values if first is None else first
    x, ffn = x + y, block["mixer"]["cms"]["ffn"]
    y = rms(x, ffn["norm"]["scale"])
    before = np.pad(y[:-1], [(1, 0), (0, 0)])
    hidden = np.maximum((y + (before - y) * ffn["mu"]) @ ffn["w_up"], 0)
    x = x + hidden**2 @ ffn["w_down"]
  return rms(x, params["final_norm"]["scale"]) @ params["embed"].T


def test_a_model_is_its_token_loop():
  model = small()
  with jax.enable_x64(True):
    params = generic(model)
    tokens = np.random.default_rng(0).integers(0, 16, (2, 11))
    logits = jax.jit(lambda p, t: model.apply(p, t)[0])(params, tokens)
    for b in range(2):
      close(logits[b], token_loop(model, params, tokens[b]), 1e-10)


def test_the_rule_is_that_of_flash_linear_attention():
  frozen = _oracle.load("rwkv7")
  names = [k.removeprefix("grad/") for k in frozen if k.startswith("grad/")]

  def run(x):
    kappa = x["kappa"]
    kappa /= jnp.linalg.norm(kappa, axis=-1, keepdims=True)
    w = -rwkv7._SLOWEST * jax.nn.sigmoid(x["w"])
    erase = (kappa, kappa * jax.nn.sigmoid(x["a"]))
    y, state = ops.general_delta_rule(
      x["r"], x["k"], x["v"], w, erase, jnp.zeros((2, 2, 4, 6)), chunk=4
    )
    return (y * frozen["cotangent"]).sum(), (y, state)

  run = jax.jit(jax.value_and_grad(run, has_aux=True))
  (_, (y, state)), grads = run({n: jnp.asarray(frozen[n]) for n in names})
  close(y, frozen["y"], 1e-5)
  close(state, frozen["state"], 1e-5)
  for n in names:
    close(grads[n], frozen[f"grad/{n}"], 1e-4)


def test_the_frozen_numbers_are_what_the_oracle_says():
  for package in ("torch", "fla", "einops"):
    pytest.importorskip(package)
  script = pytest.importorskip("tests.golden.rwkv7")
  frozen = _oracle.load("rwkv7")
  for name, array in script.make().items():
    close(array, frozen[name], 1e-5)


def test_the_start_is_that_of_its_authors():
  """RWKV-LM: shifts, biases and scales by layer and channel."""
  model = small()
  mixer = model.init(jax.random.key(0))["blocks"]["mixer"]
  D, L, at = 12, 3, np.arange(12) / 12
  for i in range(L):
    close(mixer["mu_k"][i], 1 - at ** (0.7 * (1 - i / L)), 1e-6)
    close(mixer["mu_w"][i], 1 - at ** (0.9 * (1 - i / L)), 1e-6)
    close(mixer["cms"]["ffn"]["mu"][i], 1 - at ** ((1 - i / L) ** 4), 1e-6)
    close(mixer["norm"]["scale"][i], np.full(D, ((i + 1) / L) ** 0.7), 1e-6)
    z = (np.arange(D) % 6 - 2.5) / 2.5
    base = -6 + 6 * (np.arange(D) / 11) ** (1 + (i / 2) ** 0.3)
    close(mixer["decay_bias"][i], base + 0.5 + 2.5 * z * abs(z), 1e-5)
  line = np.arange(D) / 11 - 0.5
  close(mixer["key_scale"][2], 0.71 - 0.1 * line, 1e-6)
  close(mixer["value_bias"][1], 0.73 - 0.4 * line, 1e-6)
  assert mixer["value_up"].shape == (2, 2, 12)
  assert not mixer["w_o"].any() and not mixer["gate_down"].any()


@pytest.mark.parametrize("kind", ["random", "constant"])
def test_a_long_text_keeps_the_memory_bounded(kind):
  """docs/mathematics.md 8.1, at 2048 tokens: below |k| |v| / (1 - e^w)."""
  rng = np.random.default_rng(0)
  r, k, v, a = rng.standard_normal((4, 1, 2048, 2, 8))
  if kind == "constant":
    r, k, v, a = (np.broadcast_to(x[:, :1], x.shape) for x in (r, k, v, a))
  kappa = k / np.linalg.norm(k, axis=-1, keepdims=True)
  w = np.full_like(r, -rwkv7._SLOWEST * sigmoid(-4.0))
  x = (r, kappa, v, w, (kappa, kappa * sigmoid(a)), np.zeros((1, 2, 8, 8)))
  x = jax.tree.map(lambda z: jnp.asarray(z, jnp.float32), x)
  y, S = jax.jit(ops.general_delta_rule)(*x)
  bound = np.linalg.norm(v, axis=-1).max() / -np.expm1(w[0, 0, 0, 0])
  assert (
    np.isfinite(y).all() and np.linalg.norm(S[0], axis=(1, 2)).max() < bound
  )


@pytest.mark.parametrize("size,total", [
  ("340m", 339.8), ("760m", 759.8), ("1b3", 1302.5),
])  # fmt: skip
def test_sizes_are_the_formula(size, total):
  """docs/mathematics.md 7.2 in millions, but for a LoRA of the first layer."""
  net = build.model(build.resolve(named_lib.load_config(f"rwkv7_{size}")))
  assert abs(net.parameter_count() / 1e6 - total) < 0.06
  D, F = net.width, net.cms.widths[0]
  layer = 4 * D * D + 2 * D * 288 + 14 * D + 2 * D * F + D + 2 * D
  expected = 32_000 * D + 24 * layer + D - (2 * D * 32 + D)
  assert net.parameter_count() == expected


def test_the_walk_is_the_one_that_is_named(monkeypatch):
  named = []

  def rule(q, k, v, *_, implementation, **__):
    named.append(implementation)
    return jnp.zeros(v.shape), jnp.zeros((*v.shape[:1], 2, 6, 6))

  monkeypatch.setattr(ops, "general_delta_rule", rule)
  for name in ("auto", "pallas_interpret"):
    model = small(mixer=rwkv7.Options(walk=name, **RANKS))
    params = jax.eval_shape(model.init, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    jax.eval_shape(model.apply, params, ids)
  assert set(named) == {None, "pallas_interpret"}


def test_every_parameter_and_state_has_a_place_on_the_mesh():
  model = MODELS["rwkv7"]()
  mesh = sharding.mesh(fsdp=-1, tensor=2)
  params = jax.eval_shape(model.init, jax.random.key(0))
  places = sharding.param_shardings(params, model.axes(), mesh)["blocks"][
    "mixer"
  ]
  assert places["w_r"].spec[1:] == ("fsdp", "tensor")
  assert places["value_up"].spec[1:] == (None, "tensor")
  state = jax.eval_shape(lambda p: model.init_state(p, 4, 8), params)
  place = sharding.sequence_shardings(state, mesh).layers.S_BxHxKxK
  assert place.spec[2] == "tensor"


@pytest.mark.parametrize("change,message", [
  (dict(layers=1), "model.layers must be at least 2"),
  (dict(cms=cms.Options(("a", "b"), (8, 8), (0, 0))), "has one feed-forward"),
  (dict(cms=cms.Options(widths=(8,), norm=False)), "has one feed-forward"),
  (dict(head_dim=4), "must be model.width"),
])  # fmt: skip
def test_models_that_cannot_be_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(small(), **change)


def test_switches_that_cannot_be_are_refused():
  with pytest.raises(
    ValueError, match="chunk must be a whole number from 1 to 64"
  ):
    rwkv7.Options(chunk=128)
  with pytest.raises(
    ValueError, match="model.mixer.gate_rank must be a whole number"
  ):
    rwkv7.Options(gate_rank=0)
  with pytest.raises(
    ValueError, match="model.mixer.walk must be one of auto, xla"
  ):
    rwkv7.Options(walk="reference")
  with pytest.raises(ValueError, match="has no model.mixer.value_dim"):
    lm.options("rwkv7", dict(value_dim=4))


def test_its_feed_forward_part_does_not_learn_in_context():
  with pytest.raises(ValueError, match="feed-forward part of its own form"):
    incontext.InContextModel(
      small(), incontext.Options(chunks=(4,), rates=(0.1,))
    )
