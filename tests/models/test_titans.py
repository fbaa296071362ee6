"""Titans (LMM) against a token loop, HOPE's layer and titans-pytorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import named
from nl_jax import build, memory, sharding
from nl_jax.memory import mlp, self_modifying
from nl_jax.models import cms, lm
from nl_jax.models import leaves as leaf
from nl_jax.models.mixers import deltanet, hope
from nl_jax.models.mixers.titans import lmm as titans
from tests.golden import _oracle
from tests.laws.models import MODELS
from tests.memory import oracle


def small(arch="titans_lmm", options=None, heads=2, head_dim=4):
  return lm.LanguageModel(
    arch, width=8, layers=1, heads=heads, head_dim=head_dim, vocab_size=16,
    sequence_length=16, cms=cms.Options(widths=(8,)),
    mixer=options or titans.Options(chunk=4, hidden=6),
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


def mix(module, model, params, x):
  run = lambda p, x: module.apply(p, x, None, None, model=model)[0]
  return jax.jit(run)(params, x)


def token_loop(model, params, x_TxD):
  """A layer, its memory token by token with gradients by autodiff."""
  options, H, p = model.mixer, model.heads, params
  heads = (len(x_TxD), H, -1)
  z = {}
  for n in "qkv":
    y = np.asarray(x_TxD @ p[f"w_{n}"])
    padded = np.pad(y, [(3, 0), (0, 0)])
    taps = np.asarray(p[f"conv_{n}"])
    y = sum(taps[j] * padded[j : j + len(y)] for j in range(4))
    z[n] = jax.nn.silu(jnp.asarray(y)).reshape(heads)
  unit = lambda x: x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
  gate = lambda n: jax.nn.sigmoid(
    x_TxD @ p["gate"][f"w_{n}"] + p["gate"][f"b_{n}"][None]
  )
  if options.omega > 1:
    gamma = jax.nn.sigmoid(x_TxD @ p["gate"]["w_gamma"])
  out = []
  for h in range(H):
    start = jax.tree.map(lambda w: w[h], p["memory"])  # noqa: B023
    y, _ = oracle.memory(
      options.memory, options.residual, options, start, unit(z["q"])[:, h],
      unit(z["k"])[:, h], z["v"][:, h], options.eta_max * gate("eta")[:, h],
      gate("alpha")[:, h], gate("beta")[:, h] if options.has_momentum else None,
      gamma=gamma[:, h] if options.omega > 1 else None,
    )  # fmt: skip
    mean = (y * y).mean(-1, keepdims=True)
    out.append(y / jnp.sqrt(mean + 1e-6) * p["norm"]["scale"][None])
  y = jnp.concatenate(out, axis=1) * jax.nn.silu(x_TxD @ p["w_g"])
  return y @ p["w_o"]


@pytest.mark.parametrize("options", [
  titans.Options(chunk=4, hidden=6, residual_clip=0.0),
  titans.Options(chunk=1, memory="linear", residual_clip=0.0, momentum="off"),
  titans.Options(chunk=4, hidden=6, residual_clip=0.0, omega=6),
])  # fmt: skip
def test_a_layer_is_its_token_loop(options):
  model = small(options=options)
  with jax.enable_x64(True):
    params = generic(leaf.drawn(titans.leaves(model), jax.random.key(0)))
    x = draw(1, 10, model.width)
    y = mix(titans, model, params, x)
    close(y[0], token_loop(model, params, x[0]), 1e-10)


def test_hope_without_generators_is_titans():
  """docs/mathematics.md 8.1: no generators, static gates, the same switches."""
  shared = dict(
    dgd_scope="none", momentum="off", retention_target="zero",
    erase_of="whole", residual_clip=1.0, hidden=6,
  )  # fmt: skip
  options = titans.Options(chunk=4, eta_max=1.0, **shared)
  config = self_modifying.Options(
    chunk_memory=4, chunk_gen=4, adaptive=(), gate_source="static", **shared
  )
  model, other = small(options=options), small("hope", config)
  with jax.enable_x64(True):
    params = generic(leaf.drawn(hope.leaves(other), jax.random.key(0)))
    x = draw(2, 11, 8)
    expected = mix(hope, other, params, x)
    params["gate"] = params.pop("static_gate")
    params["memory"] = params["memory"]["memory"]
    close(mix(titans, model, params, x), expected, 1e-12)


def test_a_linear_memory_with_decayed_erase_is_gated_deltanet():
  """docs/mathematics.md 8.1: rho = alpha beta, dot, no momentum."""
  options = titans.Options(
    chunk=4, memory="linear", residual=False, objective="dot", momentum="off",
    dgd_scope="per_layer", dgd_coef="decayed", residual_clip=0.0, eta_max=1.0,
  )  # fmt: skip
  model = small(options=options)
  other = small("gated_deltanet", deltanet.Options(chunk=4, output_gate=True))
  with jax.enable_x64(True):
    params = generic(leaf.drawn(deltanet.leaves(other), jax.random.key(0)))
    x = draw(2, 11, 8)
    # log a = -A softplus(z) at A = 1 is log sigmoid(-z).
    params["A_log"] = jnp.zeros((2,))
    # DeltaNet's K^-1/2 on reads goes away in the output norm, but for its
    # epsilon: large values.
    params["conv_v"] *= 1e4
    expected = mix(deltanet, other, params, x)
    params["gate"] = {
      "w_eta": params["w_beta"], "b_eta": jnp.zeros((2,)),
      "w_alpha": -params["w_a"], "b_alpha": -params["dt_bias"],
    }  # fmt: skip
    params["memory"] = {"w": jnp.zeros((2, 4, 4))}
    close(mix(titans, model, params, x), expected, 1e-9)


@pytest.mark.parametrize("name,chunk", [("token", 1), ("chunk", 4)])
def test_the_memory_is_that_of_titans_pytorch(name, chunk):
  frozen = _oracle.load("titans_memory")
  part = lambda kind: {
    k.removeprefix(f"{name}/{kind}/"): v
    for k, v in frozen.items() if k.startswith(f"{name}/{kind}/")
  }  # fmt: skip
  momentum = "sum" if chunk == 1 else "off"
  rule = memory.Rule(
    chunk=chunk, dgd_scope="none", momentum=momentum, retention_target="zero",
    read="after" if chunk == 1 else "chunk_start", inner_mean=True,
  )  # fmt: skip
  cotangents, out = part("cotangent"), part("out")

  def run(p):
    x, params = p["x"], {
      "w_in": p["memory_model_parameters.0"],
      "w_out": p["memory_model_parameters.1"],
    }  # fmt: skip
    q, k, v = (
      (x @ p[f"to_{n}.weight"].T)[:, :, None]
      for n in ("queries", "keys", "values")
    )
    logit = lambda n: (
      x @ p[f"to_{n}.0.weight"].T + p[f"to_{n}.0.bias"][None, None]
    )
    # 2: the mean square has no half.
    eta = 2 * 2.0 * jax.nn.sigmoid(logit("adaptive_step"))
    gates = memory.Gates(eta, jax.nn.log_sigmoid(-logit("decay_factor")))
    if rule.has_momentum:
      beta = jax.nn.log_sigmoid(logit("momentum"))
      gates = gates._replace(log_beta=beta)
    start = memory.chunked.start(params, 2, rule)
    y, state, _ = mlp.update(params, start, q, k, v, gates, rule=rule)
    last = state.w if chunk == 1 else state.anchor
    last = jax.tree.map(lambda w, d: w[None] + d, params, last)
    made = {"y": y[:, :, 0], **{n: w[:, 0] for n, w in last.items()}}
    return sum((made[n] * cotangents[n]).sum() for n in made), made

  with jax.enable_x64(True):
    leaves = jax.tree.map(jnp.asarray, part("in"))
    step = jax.jit(jax.value_and_grad(run, has_aux=True))
    (_, made), grads = step(leaves)
  for n, expected in out.items():
    if n == "y" and chunk > 1:  # Theirs reads a chunk's last token after it.
      keep = np.arange(11) % chunk != chunk - 1
      close(made[n][:, keep], expected[:, keep], 1e-12)
    else:
      close(made[n], expected, 1e-12)
  for n, expected in part("grad").items():
    np.testing.assert_allclose(grads[n], expected, atol=1e-11, err_msg=n)


def test_the_frozen_numbers_are_what_the_oracle_says():
  pytest.importorskip("titans_pytorch")
  script = pytest.importorskip("tests.golden.titans_memory")
  frozen = _oracle.load("titans_memory")
  for name, array in script.make().items():
    np.testing.assert_allclose(array, frozen[name], atol=1e-12, err_msg=name)


def test_a_row_that_ended_keeps_its_gradient_point():
  """From a fresh start too: the anchor is that of the last chunk edge."""
  model = small()
  with jax.enable_x64(True):
    params = generic(leaf.drawn(titans.leaves(model), jax.random.key(0)))
    x, ids = draw(1, 16, 8), (jnp.arange(16) < 6).astype(jnp.int32)[None]
    start = titans.init_state(params, 1, 0, model=model)
    run = jax.jit(
      lambda state: titans.apply(params, x, state, ids, model=model)[1].memory
    )
    fresh, later = run(None), run(start)
  assert (later.anchor["w_in"] != later.w["w_in"]).any()
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
  jax.tree.map(same, fresh, later)


@pytest.mark.parametrize("kind", ["random", "constant", "repeated"])
def test_the_default_memory_stays_bounded(kind):
  """docs/mathematics.md 8.1, at 4096 tokens: no norm above 10 x its start."""
  model = small(options=titans.Options(chunk=8, hidden=8))
  params = leaf.drawn(titans.leaves(model), jax.random.key(0))
  x = draw(1, 4096, 8).astype(jnp.float32)
  if kind == "constant":
    x = jnp.broadcast_to(x[:, :1], x.shape)
  if kind == "repeated":
    x = jnp.repeat(x[:, :256], 16, axis=1)
  _, state, metrics = jax.jit(
    lambda p, x: titans.apply(p, x, None, None, model=model)
  )(params, x)
  norm = lambda tree: np.sqrt(sum((w**2).sum() for w in jax.tree.leaves(tree)))
  start = jax.tree.map(lambda w: w[None], params["memory"])
  last = jax.tree.map(np.add, start, state.memory.w)
  assert norm(last) < 10 * norm(params["memory"])
  assert np.isfinite(metrics["memory"].memory_norm).all()


def test_sizes_are_the_formula_and_the_table():
  for size, total in (("340m", 340.4), ("760m", 761.1), ("1b3", 1301.7)):
    config = build.resolve(named.load_config(f"titans_lmm_{size}"))
    net = build.model(config)
    assert abs(net.parameter_count() / 1e6 - total) < 0.06
    D, H, K, M = net.width, net.heads, net.head_dim, net.mixer.hidden
    assert M == K == 128 and net.mixer.chunk == 64
    expected = 5 * D * D + 12 * D + 3 * H * (D + 1) + 2 * H * K * M + K
    assert leaf.count(titans.leaves(net)) == expected


@pytest.mark.parametrize("change,message", [
  (dict(memory="deep"), "model.mixer.memory must be one of"),
  (dict(momentum="nesterov"), "model.mixer.momentum must be one of"),
  (dict(value_norm="target"), "model.mixer.value_norm must be one of none, l2"),
  (dict(eta_max=0.0), "model.mixer.eta_max must be a number above 0"),
  (dict(omega=0), "model.mixer.omega must be a whole number from 1"),
])  # fmt: skip
def test_switches_that_cannot_be_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(MODELS["titans_lmm"]().mixer, **change)


def test_a_window_is_counted_and_carried():
  model, plain = MODELS["titans_omega"](), MODELS["titans_lmm"]()
  more = model.parameter_count() - plain.parameter_count()
  assert more == model.layers * model.width * model.heads
  row, other = (m.levels()[0][0] for m in (model, plain))
  assert row.rule == "GD + ema momentum of 11 tokens, retention"
  # 10 tokens of keys, values and gates.
  assert row.state_bytes - other.state_bytes == 4 * 2 * 4 * 10 * (16 + 16 + 1)


def test_a_window_has_a_place_on_the_mesh():
  model, mesh = MODELS["titans_omega"](), sharding.mesh(fsdp=-1, tensor=2)
  params = jax.eval_shape(model.init, jax.random.key(0))
  state = jax.eval_shape(lambda p: model.init_state(p, 4, 8), params)
  gate = sharding.param_shardings(params, model.axes(), mesh)["blocks"][
    "mixer"
  ]["gate"]
  assert gate["w_gamma"].spec[1:] == ("fsdp", "tensor")
  places = sharding.sequence_shardings(state, mesh).layers.memory.carried
  for name in ("past_k", "past_v", "past_gamma"):
    assert places[name].spec[2] == "tensor"


def test_a_switch_of_another_row_is_named():
  with pytest.raises(ValueError, match="no model.mixer.generators; it has"):
    lm.options("titans_lmm", {"generators": {}})
