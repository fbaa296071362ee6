"""Gated DeltaNet-2: its rule against a frozen token loop, its limits, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import named
from nl_jax import build, sharding
from nl_jax.kernels import general_delta_rule as ops
from nl_jax.models import leaves as leaf
from nl_jax.models.mixers import gated_deltanet2
from tests.golden import _oracle
from tests.laws.models import MODELS

B, T, H, K, V = 2, 24, 2, 4, 3


def close(x, y, tolerance=1e-10):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def rule(q, k, v, g, erase, **how):
  """Gated DeltaNet-2 from an empty memory: q, k, gated v, decays, erase."""
  state = jnp.zeros((k.shape[0], k.shape[2], k.shape[3], v.shape[3]), v.dtype)
  return ops.general_delta_rule(
    q, k, v, g, (erase * k * jnp.exp(g), k), state, block=4, **how
  )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_rule_is_the_frozen_token_loop(implementation):
  golden = _oracle.load("gated_deltanet2")
  names = ("q", "k", "v", "decay", "erase", "write")

  def run(x):
    unit = lambda z: z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    q, k = unit(x["q"]) * x["q"].shape[-1] ** -0.5, unit(x["k"])
    v = jax.nn.sigmoid(x["write"]) * x["v"]
    g, erase = -jax.nn.softplus(x["decay"]), jax.nn.sigmoid(x["erase"])
    return rule(q, k, v, g, erase, chunk=8, implementation=implementation)

  with jax.enable_x64(True):
    x = {name: jnp.asarray(golden[name]) for name in names}
    (y, state), back = jax.vjp(jax.jit(run), x)
    close(y, golden["y"])
    close(state, golden["state"])
    (made,) = back((jnp.asarray(golden["cotangent"]), jnp.zeros_like(state)))
    for name in names:
      close(made[name], golden[f"grad/{name}"])


def draw(dtype=np.float32):
  rng = np.random.default_rng(0)
  q, k, w, b = rng.standard_normal((4, B, T, H, K)).astype(dtype)
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  v = rng.standard_normal((B, T, H, V)).astype(dtype)
  return [jnp.asarray(x) for x in (q, k, v, w, jax.nn.sigmoid(b))]


def test_the_fastest_decays_stay_in_float32():
  """-5 at all of 64 tokens, at some of them, and none, against float64."""
  rng = np.random.default_rng(1)
  q, k, b = rng.standard_normal((3, 1, 128, 3, 8))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  v, g = rng.standard_normal((1, 128, 3, 5)), np.full(q.shape, -5.0)
  g[:, :, 1] *= rng.integers(0, 2, g[:, :, 1].shape)
  g[:, :, 2] = 0
  erase = 1 / (1 + np.exp(-b))

  def run(dtype, implementation):
    x = [jnp.asarray(z, dtype) for z in (q, k, v, g, erase)]
    state = jnp.zeros((1, 3, 8, 5), dtype)

    def f(*x):
      pair = (x[4] * x[1] * jnp.exp(x[3]), x[1])
      return ops.general_delta_rule(
        *x[:4], pair, state, block=16, implementation=implementation
      )[0]

    y, back = jax.vjp(jax.jit(f), *x)
    return y, back(jnp.ones_like(y))

  with jax.enable_x64(True):
    right = jax.tree.map(np.asarray, run(jnp.float64, "reference"))
  made = run(jnp.float32, "xla")
  close(made[0], right[0], 1e-5)
  for mine, other in zip(made[1], right[1]):
    close(mine, other, 1e-4)


def test_a_kernel_is_the_token_loop():
  """Documents that begin in chunks and with them; blocks of half a chunk."""
  q, k, v, w, erase = draw()
  at = np.zeros((B, T), bool)
  at[0, 5], at[0, 8], at[1, 13] = True, True, True

  def run(implementation):
    f = lambda *x: rule(
      *x, begins=jnp.asarray(at), chunk=8, implementation=implementation
    )
    y, back = jax.vjp(f, q, k, v, -jax.nn.softplus(3 * w), erase)
    return y, back(y)

  made, other, same = jax.jit(
    lambda: tuple(map(run, ("pallas_interpret", "xla", "reference")))
  )()
  for i, tolerance in ((0, 1e-5), (1, 1e-4)):
    for y in (made, other):
      for mine, right in zip(*map(jax.tree.leaves, (y[i], same[i]))):
        close(mine, np.asarray(right), tolerance)


def test_with_numbers_a_head_it_is_gated_deltanet():
  with jax.enable_x64(True):
    q, k, v, w, erase = draw(np.float64)
    beta, g = erase[..., :1], -jax.nn.softplus(w[..., :1])
    wide = lambda x: jnp.broadcast_to(x, k.shape)
    y, _ = rule(q, k, beta * v, wide(g), wide(beta), chunk=8)
    S = np.zeros((B, H, K, V))
    for t in range(T):
      one, a = np.asarray(k[:, t]), np.exp(np.asarray(g[:, t]))[..., None]
      error = v[:, t] - np.einsum("bhk,bhkv->bhv", one, a * S)
      write = np.asarray(beta[:, t] * error)
      S = a * S + one[..., None] * write[:, :, None]
      close(np.einsum("bhk,bhkv->bhv", q[:, t], S), np.asarray(y[:, t]))


@pytest.mark.parametrize("scale", ["340m", "760m", "1b3"])
def test_sizes(scale):
  config = named.load_config(f"gated_deltanet2_{scale}")
  net = build.model(build.resolve(config))
  D, H, K = net.width, net.heads, net.head_dim
  HK, HV, R = H * K, H * net.mixer.value_dim, 128
  kernels = 3 * D * (HK + HV) + R * (2 * D + HK + HV)
  expected = kernels + 4 * (2 * HK + HV) + H + HK + HV // H
  assert leaf.count(gated_deltanet2.leaves(net.dims)) == expected


def test_every_parameter_and_state_has_a_place_on_the_mesh():
  model, mesh = MODELS["gated_deltanet2"](), sharding.mesh(fsdp=-1, tensor=2)
  params = jax.eval_shape(model.init, jax.random.key(0))
  places = sharding.param_shardings(params, model.axes(), mesh)
  places = places["blocks"]["mixer"]
  assert places["w_erase"].spec[1:] == ("fsdp", "tensor")
  assert places["dt_bias"].spec[1:] == ("tensor",)
  state = jax.eval_shape(lambda p: model.init_state(p, 4, 8), params)
  place = sharding.sequence_shardings(state, mesh).layers.S_BxHxKxV
  assert place.spec[2] == "tensor"
