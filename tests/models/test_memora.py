"""Memora against a token loop that takes the softmax of the definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import named
from nl_jax import build, memory, sharding
from nl_jax.models import leaves as leaf
from nl_jax.models.mixers.titans import memora
from tests.laws.models import MODELS
from tests.memory import oracle
from tests.models import test_titans

draw, close = test_titans.draw, test_titans.close
unit = lambda x: x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def token_loop(model, p, x_TxD):
  """Weights themselves, W = softmax(alpha log W - eta grad), by autodiff."""
  options, H, K = model.mixer, model.heads, model.head_dim
  z = {}
  for n in "qkv":
    y = np.pad(np.asarray(x_TxD @ p[f"w_{n}"]), [(3, 0), (0, 0)])
    taps = np.asarray(p[f"conv_{n}"])
    y = sum(taps[j] * y[j : j + len(x_TxD)] for j in range(4))
    z[n] = jax.nn.silu(jnp.asarray(y)).reshape(-1, H, K)
  rate = {
    n: jax.nn.sigmoid(
      x_TxD @ p["gate"][f"w_{n}_down"] @ p["gate"][f"w_{n}_up"]
      + p["gate"][f"b_{n}"][None]
    ).reshape(-1, H, K)
    for n in ("eta", "alpha")
  }  # fmt: skip
  forward = lambda W, x: oracle.forward("mlp_ln", True, W, x)
  loss = lambda W, k, v: 0.5 * ((forward(W, k) - v) ** 2).sum()
  out = []
  for h in range(H):
    log = {n: jax.nn.log_softmax(w[h], 0) for n, w in p["memory"].items()}
    anchor, reads = jax.tree.map(jnp.exp, log), []
    for t in range(len(x_TxD)):
      G = jax.grad(loss)(anchor, unit(z["k"][t, h]), z["v"][t, h])
      eta, alpha = options.eta_max * rate["eta"][t, h], rate["alpha"][t, h]
      # Along the key's side of w_in, and the value's side of w_out.
      along = {"w_in": lambda g: g[:, None], "w_out": lambda g: g[None]}
      log = {n: f(alpha) * log[n] - f(eta) * G[n] for n, f in along.items()}
      W = jax.tree.map(lambda w: jax.nn.softmax(w, 0), log)
      if not options.lag or t % options.chunk == 0:
        log = jax.tree.map(jnp.log, W)
      reads.append(forward(W, unit(z["q"][t, h])))
      anchor = W if (t + 1) % options.chunk == 0 else anchor
    y = jnp.stack(reads)
    y = y / jnp.sqrt((y * y).mean(-1, keepdims=True) + 1e-6)
    out.append(y * p["norm"]["scale"][None])
  y = jnp.concatenate(out, axis=1) * jax.nn.silu(x_TxD @ p["w_g"])
  return y @ p["w_o"]


@pytest.mark.parametrize("chunk,lag", [(1, False), (4, False), (4, True)])
def test_a_layer_is_its_token_loop(chunk, lag):
  options = memora.Options(
    chunk=chunk, hidden=6, rank=3, residual_clip=0.0, eta_max=1.0, lag=lag
  )
  model = test_titans.small("memora", options)
  with jax.enable_x64(True):
    params = test_titans.generic(
      leaf.drawn(memora.leaves(model), jax.random.key(0))
    )
    x = draw(1, 10, model.width)
    y = test_titans.mix(memora, model, params, x)
    close(y[0], token_loop(model, params, x[0]), 1e-9)


@pytest.mark.parametrize("kind", ["random", "constant"])
def test_columns_sum_to_one_and_weights_move(kind):
  """docs/mathematics.md 8.1, at 512 tokens: bounded by what it is."""
  model = test_titans.small("memora", memora.Options(chunk=8, hidden=8))
  params = leaf.drawn(memora.leaves(model), jax.random.key(0))
  x = draw(1, 512, 8).astype(np.float32)
  x = np.broadcast_to(x[:, :1], x.shape) if kind == "constant" else x
  y, state, _ = jax.jit(
    lambda p, x: memora.apply(p, x, None, None, model=model)
  )(params, x)
  assert np.isfinite(y).all()
  for name, w in state.memory.w.items():  # Deviations from the start.
    start = jax.nn.log_softmax(params["memory"][name], -2)
    np.testing.assert_allclose(np.exp(start[None] + w).sum(-2), 1.0, rtol=1e-5)
    assert not np.allclose(w, 0.0, atol=1e-3)


@pytest.mark.parametrize("size,total", [
  ("340m", 341.4), ("760m", 755.2), ("1b3", 1302.6),
])  # fmt: skip
def test_sizes_are_the_formula(size, total):
  """5 D² + 12 D + 2 (2 D rank + D) + 2 H K M + K a mixer, in millions."""
  net = build.model(build.resolve(named.load_config(f"memora_{size}")))
  assert abs(net.parameter_count() / 1e6 - total) < 0.06
  D, H, K, M = net.width, net.heads, net.head_dim, net.mixer.hidden
  expected = 5 * D * D + 14 * D + 4 * D * net.mixer.rank + 2 * H * K * M + K
  assert leaf.count(memora.leaves(net)) == expected


def test_every_parameter_has_a_place_on_the_mesh():
  model, mesh = MODELS["memora"](), sharding.mesh(fsdp=-1, tensor=2)
  params = jax.eval_shape(model.init, jax.random.key(0))
  gate = sharding.param_shardings(params, model.axes(), mesh)["blocks"][
    "mixer"
  ]["gate"]
  assert gate["w_eta_down"].spec[1:] == ("fsdp", None)
  assert gate["w_alpha_up"].spec[1:] == (None, "tensor")


@pytest.mark.parametrize("change,message", [
  (dict(momentum="ema"), "must be 'off', got 'ema': use model.arch"),
  (dict(memory="mlp"), "must be 'mlp_ln', got 'mlp'"),
  (dict(omega=2), "use model.arch='titans_lmm'"),
  (dict(rank=0), "model.mixer.rank must be a whole number from 1"),
  (dict(walk="pallas_tpu"), "model.mixer.walk must be one of auto, xla; got"),
  (dict(lag=1), "model.mixer.lag must be True or False, got 1"),
])  # fmt: skip
def test_switches_that_cannot_be_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(MODELS["memora"]().mixer, **change)


def test_a_text_with_lags_is_its_parts():
  options = memora.Options(chunk=4, hidden=6, rank=3, lag=True, eta_max=1.0)
  model = test_titans.small("memora", options)
  with jax.enable_x64(True):
    params = test_titans.generic(
      leaf.drawn(memora.leaves(model), jax.random.key(0))
    )
    x = draw(1, 10, model.width)
    run = jax.jit(lambda p, x, s: memora.apply(p, x, s, None, model=model)[:2])
    begin = memora.init_state(params, 1, 0, model=model)
    whole, end = run(params, x, begin)
    parts, state = [], begin
    for i, j in ((0, 4), (4, 5), (5, 6), (6, 10)):
      y, state = run(params, x[:, i:j], state)
      parts.append(y)
  close(np.concatenate(parts, 1), whole, 1e-10)
  close(state.memory.w["w_in"], end.memory.w["w_in"], 1e-10)


def test_a_kernel_that_is_named_is_refused():
  """No kernel forms every state of a chunk."""
  options = memora.Options(chunk=4, hidden=6)
  start = {"w_in": jnp.zeros((1, 4, 6)), "w_out": jnp.zeros((1, 6, 4))}
  x = jnp.zeros((1, 8, 1, 4))
  with pytest.raises(ValueError, match="simplex cannot run as pallas_tpu"):
    memory.simplex.update(
      options.forward, start, memory.chunked.start(start, 1, options),
      x, x, x, memory.Gates(x, x), rule=options, lag=True,
      run=memory.Run("pallas_tpu"),
    )  # fmt: skip
