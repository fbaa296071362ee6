"""TTT against a token loop and flash-linear-attention's reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import named
from nl_jax import build, memory
from nl_jax.models import cms, layers, lm
from nl_jax.models import leaves as leaf
from nl_jax.models.mixers import ttt
from tests.golden import _oracle

NAMES = ("ttt_linear", "ttt_mlp")


def small(arch, **options):
  return lm.LanguageModel(
    arch, width=8, layers=1, heads=2, head_dim=4, vocab_size=16,
    sequence_length=16, cms=cms.Options(widths=(8,)),
    mixer=ttt.Options(**{"chunk": 4} | options),
  )  # fmt: skip


def generic(tree, seed=0):
  """Float64 parameters, none of them at a special value."""
  rng = np.random.default_rng(seed)
  move = lambda x: np.asarray(x, float) + 0.3 * rng.standard_normal(x.shape)
  return jax.tree.map(lambda x: jnp.asarray(move(x)), tree)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def close(x, y, tolerance):
  y = np.asarray(y)
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def norm(x, scale, shift):
  centred = x - x.mean(-1, keepdims=True)
  x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
  return x * scale + shift


def short_conv(x_TxE, taps, bias):
  padded = np.pad(x_TxE, [(3, 0), (0, 0)])
  return sum(taps[j] * padded[j : j + len(x_TxE)] for j in range(4)) + bias


def token_loop(model, params, x_TxD):
  """A layer from docs/mathematics.md 6, inner gradients by `jax.grad`."""
  p = jax.tree.map(np.asarray, params)
  C, H, K = model.mixer.chunk, model.heads, model.head_dim
  fast, affine, T = p["memory"], p["memory_norm"], len(x_TxD)
  z = x_TxD @ p["w_qk"]
  split = lambda x: x.reshape(T, H, K)
  place = jnp.asarray(np.arange(T) % C)[None]
  turned = lambda n: np.asarray(layers.rope(
    jnp.asarray(split(short_conv(z, p[f"conv_{n}"], p[f"b_{n}"])))[None], place
  ))[0]  # fmt: skip
  q, k, v = turned("q"), turned("k"), split(x_TxD @ p["w_v"])
  out = np.zeros((T, H, K))
  for h in range(H):

    def f(W, z):
      if "w" in W:
        y = z @ W["w"] + W["b_w"]
      else:
        y = jax.nn.gelu(z @ W["w_in"] + W["b_in"]) @ W["w_out"] + W["b_out"]
      centred = y - y.mean()
      y = centred / jnp.sqrt((centred**2).mean() + 1e-6)
      return y * affine["scale"][h] + affine["bias"][h]  # noqa: B023

    inner = jax.jit(
      jax.grad(lambda W, k, t: 0.5 * ((f(W, k) - t) ** 2).sum())  # noqa: B023
    )
    read = jax.jit(f)
    W = start = {n: w[h] for n, w in fast.items()}
    for t in range(T):
      if t % C == 0:
        start, total = W, jax.tree.map(np.zeros_like, W)
      logit = x_TxD[t] @ p["w_lr"][:, h] + p["b_lr"][h]
      eta = model.mixer.base_lr / (1 + np.exp(-logit)) / K
      g = inner(start, k[t, h], v[t, h] - k[t, h])
      total = jax.tree.map(lambda a, b: a + eta * b, total, g)  # noqa: B023
      rate = max(0.0, p["token_rate"][t % C] + 1 / (t % C + 1))
      W = jax.tree.map(lambda a, b: a - rate * b, start, total)  # noqa: B023
      out[t, h] = q[t, h] + read(W, q[t, h])
  y = norm(out.reshape(T, -1), p["norm"]["scale"], p["norm"]["bias"])
  return y * np.asarray(jax.nn.gelu(x_TxD @ p["w_g"])) @ p["w_o"]


@pytest.mark.parametrize("name,options", [
  ("ttt_linear", {}),
  ("ttt_mlp", dict(base_lr=0.5, hidden=6)),
])  # fmt: skip
def test_a_layer_is_its_token_loop(name, options):
  model = small(name, **options)
  with jax.enable_x64(True):
    params = generic(leaf.drawn(ttt.leaves(model), jax.random.key(0)))
    x = draw(1, 10, 8)
    run = lambda p, x: ttt.apply(p, x, None, None, model=model)[0]
    y = jax.jit(run)(params, x)
    close(y[0], token_loop(model, params, np.asarray(x[0])), 1e-9)


def test_the_memory_is_that_of_flash_linear_attention():
  frozen = {k: jnp.asarray(v) for k, v in _oracle.load("ttt_linear").items()
            if k != "versions"}  # fmt: skip
  names = [n.removeprefix("in/") for n in frozen if n.startswith("in/")]
  rule = ttt.Options(chunk=4).rule

  def run(x):
    affine = {"scale": x["scale"][:, None], "bias": x["shift"][:, None]}
    params = {"w": jnp.concatenate([x["w"], x["b"][:, None]], axis=1)}
    ones = jnp.ones(x["k"].shape[:3])
    _, state, _ = memory.chunked.update(
      ttt.forward(deep=False), params,
      memory.chunked.start(params, 2, rule), x["k"], x["k"], x["v"] - x["k"],
      memory.Gates(ones, 0 * ones), rule=rule, slow=affine,
      row=jax.nn.sigmoid(x["row"]),
    )  # fmt: skip
    last = params["w"][None] + state.w["w"]
    return (last * frozen["cotangent"]).sum(), last

  inputs = {n: frozen[f"in/{n}"] for n in names}
  step = jax.jit(jax.value_and_grad(run, has_aux=True))
  (_, last), grads = step(inputs)
  close(last, frozen["last"], 1e-5)
  for n in names:
    close(grads[n], frozen[f"grad/{n}"], 1e-4)


def test_the_frozen_numbers_are_what_the_oracle_says():
  pytest.importorskip("torch")
  script = pytest.importorskip("tests.golden.ttt_linear")
  frozen = _oracle.load("ttt_linear")
  for name, array in script.make().items():
    close(array, frozen[name], 1e-5)


def test_places_go_on_where_a_call_stopped():
  rule = ttt.Options(chunk=4).rule
  start = {"w": jnp.zeros((1, 2, 2))}
  state, got, T = memory.chunked.start(start, 1, rule), [], 11
  x, one = jnp.zeros((1, T, 1, 2)), jnp.ones((1, T, 1))
  for a, b in ((0, 3), (3, 4), (4, 9), (9, 11)):
    got.append(memory.chunked.places(state, None, b - a, 4))
    part = x[:, a:b]
    _, state, _ = memory.linear.update(
      start, state, part, part, part,
      memory.Gates(one[:, a:b], 0 * one[:, a:b]), rule=rule,
    )  # fmt: skip
  np.testing.assert_array_equal(np.concatenate(got, 1)[0], np.arange(T) % 4)


def test_a_call_that_begins_a_document_begins_a_mini_batch():
  rule = ttt.Options(chunk=4).rule
  start = {"w": jnp.zeros((1, 2, 2))}
  state = memory.chunked.start(start, 2, rule)
  state = state._replace(
    phase=jnp.asarray([3, 3], jnp.int32), segment=jnp.asarray([1, 1], jnp.int32)
  )
  ids = jnp.asarray([[0, 2, 2, 2], [1, 1, 1, 1]], jnp.int32)
  places = memory.chunked.places(state, ids, 4, 4)
  np.testing.assert_array_equal(places, [[3, 0, 1, 2], [3, 0, 1, 2]])
  np.testing.assert_array_equal(
    memory.chunked.places(state, ids[:, 1:], 3, 4), [[0, 1, 2], [3, 0, 1]]
  )


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_the_formula_and_the_table(name):
  """docs/mathematics.md 7.2, in millions, and 6 D a layer of pre_conv."""
  table = dict(
    ttt_linear=(338.7, 760.8, 1304.2), ttt_mlp=(340.4, 763.3, 1298.1)
  )
  for size, total in zip(("340m", "760m", "1b3"), table[name]):
    config = build.resolve(named.load_config(f"{name}_{size}"))
    net = build.model(config)
    D, H, K = net.width, net.heads, net.head_dim
    extra = net.layers * 6 * D
    assert abs((net.parameter_count() - extra) / 1e6 - total) < 0.06
    inner = K * K + K if name == "ttt_linear" else 8 * K * K + 5 * K
    expected = 4 * D * D + 20 * D + 16 + H * (D + 1) + H * inner
    assert leaf.count(ttt.leaves(net)) == expected


def test_the_first_convolution_is_a_switch():
  model, plain = small("ttt_linear"), small("ttt_linear", pre_conv=False)
  params = model.init(jax.random.key(0))
  tokens = jnp.arange(8)[None]
  still = jax.tree.map(jnp.copy, params)
  still["blocks"]["mixer"]["conv_pre"] *= 0
  got, _, _ = model.apply(still, tokens)
  for name in ("conv_pre", "b_pre", "pre_norm"):
    still["blocks"]["mixer"].pop(name)
  np.testing.assert_allclose(got, plain.apply(still, tokens)[0], atol=1e-6)
  assert (got != model.apply(params, tokens)[0]).any()


def test_switches_that_cannot_be_are_refused():
  with pytest.raises(
    ValueError, match="model.mixer.base_lr must be a number above 0"
  ):
    ttt.Options(base_lr=0.0)
  with pytest.raises(
    ValueError, match="model.mixer.chunk must be a whole number from 1"
  ):
    ttt.Options(chunk=0)
  with pytest.raises(ValueError, match="has no hidden units"):
    small("ttt_linear", hidden=8)
  with pytest.raises(ValueError, match="must be even for RoPE"):
    dataclasses.replace(small("ttt_mlp"), heads=8, head_dim=1)
  with pytest.raises(ValueError, match="no model.mixer.momentum; it has"):
    lm.options("ttt_mlp", {"momentum": "ema"})
