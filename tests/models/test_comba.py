"""Comba against a token loop, its limit and flash-linear-attention."""

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


def small(arch="comba", **options):
  return lm.LanguageModel(
    arch, width=12, layers=1, heads=2, head_dim=6, vocab_size=16,
    sequence_length=16, cms=cms.Options(widths=(8,)),
    mixer=deltanet.Options(**{"chunk": 4} | options),
  )  # fmt: skip


def generic(model, seed=0, scale=0.3):
  """Float64 parameters of one layer, none of them at a special value."""
  params = leaf.drawn(deltanet.leaves(model), jax.random.key(seed))
  rng = np.random.default_rng(seed)
  move = lambda x: np.asarray(x, float) + scale * rng.standard_normal(x.shape)
  return jax.tree.map(lambda x: jnp.asarray(move(x)), params)


def mix(model, params, x):
  run = lambda p, x: deltanet.apply(p, x, None, None, model=model)[0]
  return jax.jit(run)(params, x)


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
  H, K = model.heads, model.head_dim
  norm = lambda z: z / np.sqrt(z @ z + 1e-6)
  z = {n: x_TxD @ p[f"w_{n}"] for n in "qkv"}
  S = [np.zeros((K, p["w_v"].shape[1] // H)) for _ in range(H)]
  out = np.zeros_like(x_TxD)
  for t, x in enumerate(x_TxD):
    conv = {}
    for n in "qkv":
      taps = [p[f"conv_{n}"][3 - j] * z[n][t - j] for j in range(4) if j <= t]
      conv[n] = (sum(taps) * sigmoid(sum(taps))).reshape(H, -1)
    heads = []
    for h in range(H):
      q, k, v = norm(conv["q"][h]), norm(conv["k"][h]), conv["v"][h]
      erase = sigmoid(p["erase"][h]) * k
      step = np.log1p(np.exp(x @ p["w_a"][:, h] + p["dt_bias"][h]))
      S[h] = np.exp(-np.exp(p["A_log"][h]) * step) * S[h]
      beta = sigmoid(x @ p["w_beta"][:, h])
      S[h] = S[h] + beta * np.outer(k, v - erase @ S[h])
      y = (q - p["correction"][h] * erase) @ S[h] / np.sqrt(K)
      heads.append(y / np.sqrt((y * y).mean() + 1e-6) * p["norm"]["scale"])
    out[t] = (np.concatenate(heads) * sigmoid(x @ p["w_g"])) @ p["w_o"]
  return out


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_layer_is_its_token_loop(chunk):
  options = dict(value_dim=4, output_gate=True, correction=1.0)
  model = small(chunk=chunk, **options)
  with jax.enable_x64(True):
    params, x = generic(model), draw(2, 11, model.width)
    y = mix(model, params, x)
    for b in range(2):
      close(y[b], token_loop(model, params, np.asarray(x[b])), 1e-10)


def test_with_a_whole_erase_and_no_correction_it_is_gated_deltanet():
  with jax.enable_x64(True):
    params, x = generic(small()), draw(2, 9, 12)
    params["erase"] = jnp.full_like(params["erase"], 100.0)
    params["correction"] = 0 * params["correction"]
    y = mix(small(), params, x)
    params.pop("erase"), params.pop("correction")
    close(y, mix(small("gated_deltanet"), params, x), 1e-12)


def test_the_start_is_that_of_its_authors():
  params = leaf.drawn(
    deltanet.leaves(small(correction=0.02)), jax.random.key(0)
  )
  np.testing.assert_array_equal(params["erase"], 1.0)
  np.testing.assert_array_equal(params["correction"], np.float32(0.02))


def test_the_rule_is_that_of_flash_linear_attention():
  frozen = _oracle.load("comba")
  names = [k.removeprefix("grad/") for k in frozen if k.startswith("grad/")]
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  rule = deltanet.Options(chunk=4).rule

  def run(x):
    start = {"w": jnp.zeros((2, 4, 6))}
    q, k, v = deltanet.closed_loop(x, unit(x["q"]), unit(x["k"]), x["v"])
    gates = memory.Gates(jax.nn.sigmoid(x["beta"]), jax.nn.log_sigmoid(x["g"]))
    y, state, _ = linear.update(
      start, memory.chunked.start(start, 2, rule), q * 4**-0.5, k, v, gates,
      rule=rule,
    )  # fmt: skip
    return (y * frozen["cotangent"]).sum(), (y, state.w["w"])

  inputs = {n: jnp.asarray(frozen[n]) for n in names}
  run = jax.jit(jax.value_and_grad(run, has_aux=True))
  (_, (y, state)), grads = run(inputs)
  close(y, frozen["y"], 1e-5)
  close(state, frozen["state"], 1e-5)
  for n in names:
    close(grads[n], frozen[f"grad/{n}"], 1e-4)


def test_the_frozen_numbers_are_what_the_oracle_says():
  for package in ("torch", "fla", "einops"):
    pytest.importorskip(package)
  script = pytest.importorskip("tests.golden.comba")
  frozen = _oracle.load("comba")
  for name, array in script.make().items():
    close(array, frozen[name], 1e-5)


@pytest.mark.parametrize("size", ["tiny", "340m", "760m", "1b3"])
def test_two_numbers_a_head_more_than_gated_deltanet(size):
  nets = [
    build.model(build.resolve(named.load_config(f"{arch}_{size}")))
    for arch in ("comba", "gated_deltanet")
  ]
  counts = [net.parameter_count() for net in nets]
  assert counts[0] - counts[1] == 2 * nets[0].heads * nets[0].layers


def test_every_parameter_has_a_place_on_the_mesh():
  model, mesh = MODELS["comba"](), sharding.mesh(fsdp=-1, tensor=2)
  params = jax.eval_shape(model.init, jax.random.key(0))
  places = sharding.param_shardings(params, model.axes(), mesh)["blocks"][
    "mixer"
  ]
  for name in ("erase", "correction"):
    assert places[name].spec[1:] == ("tensor",)


@pytest.mark.parametrize("arch", ["deltanet", "gated_deltanet"])
def test_a_correction_is_combas_alone(arch):
  with pytest.raises(ValueError, match="or use model.arch='comba'"):
    dataclasses.replace(small(arch), mixer=deltanet.Options(correction=1.0))
