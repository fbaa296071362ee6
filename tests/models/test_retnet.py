"""RetNet against a token loop, closed forms and flash-linear-attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import named
from nl_jax import build, memory, sharding
from nl_jax.memory import linear
from nl_jax.models import cms, lm
from nl_jax.models.mixers import retnet
from tests.golden import _oracle
from tests.laws.models import MODELS


def small(chunk=4):
  return lm.LanguageModel(
    "retnet", width=12, layers=1, heads=3, head_dim=4, vocab_size=16,
    sequence_length=16, cms=cms.CMSConfig(widths=(8,)),
    mixer=retnet.Options(chunk=chunk),
  )  # fmt: skip


def generic(model, seed=0, scale=0.3):
  """Float64 parameters of one layer, none of them at a special value."""
  params = retnet.init(jax.random.key(seed), model)
  rng = np.random.default_rng(seed)
  move = lambda x: np.asarray(x, float) + scale * rng.standard_normal(x.shape)
  return jax.tree.map(lambda x: jnp.asarray(move(x)), params)


def mix(model, params, x, ids=None, state=None):
  run = lambda p, x, s, ids: retnet.apply(p, x, s, ids, model=model)[:2]
  return jax.jit(run)(params, x, state, ids)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def close(x, y, tolerance):
  y = np.asarray(y)
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def turn(z, position):
  """Each pair (i, i + K/2) of z [K] as a complex number, by its angle."""
  half = len(z) // 2
  angle = position * 10000.0 ** (-np.arange(half) / half)
  turned = (z[:half] + 1j * z[half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag])


def token_loop(model, params, x_TxD):
  """A layer by its definition (docs/mathematics.md 6), by token and head."""
  p = jax.tree.map(np.asarray, params)
  H, K = model.heads, model.head_dim
  S = np.zeros((H, K, 2 * K))
  out = np.zeros_like(x_TxD)
  for t, x in enumerate(x_TxD):
    z = {n: (x @ p[f"w_{n}"]).reshape(H, -1) for n in "qkvg"}
    heads = []
    for h in range(H):
      k, q = turn(z["k"][h], t), turn(z["q"][h], t)
      S[h] = (1 - 2.0 ** (-5 - h)) * S[h] + np.outer(k, z["v"][h])
      y = q @ S[h] / np.sqrt(K)
      y = y / np.sqrt((y * y).mean() + 1e-6) * p["norm"]["scale"]
      heads.append(y * z["g"][h] / (1 + np.exp(-z["g"][h])))
    out[t] = np.concatenate(heads) @ p["w_o"]
  return out


def test_a_layer_is_its_token_loop():
  model = small()
  with jax.enable_x64(True):
    params, x = generic(model), draw(2, 11, model.width)
    y, _ = mix(model, params, x)
    for b in range(2):
      close(y[b], token_loop(model, params, np.asarray(x[b])), 1e-10)


def test_the_chunk_is_no_part_of_the_function():
  with jax.enable_x64(True):
    x = draw(1, 20, 12)
    ys = []
    for chunk in (1, 4, 32):
      model = small(chunk)
      ys.append(mix(model, generic(model), x)[0])
    for y in ys[1:]:
      close(y, ys[0], 1e-10)


# Two documents, padding between and after; the second row is one document
# that begins late.
PACKED = [
  [1] * 5 + [2] * 2 + [0] * 2 + [3] * 5 + [0],
  [0] * 3 + [7] * 12,
]


def test_documents_begin_anywhere_and_positions_with_them():
  model = small()
  assert model.alignment == 1
  with jax.enable_x64(True):
    params, x = generic(model), draw(2, 15, model.width)
    y, state = mix(model, params, x, jnp.asarray(PACKED, jnp.int32))
    for b, a, e in ((0, 0, 5), (0, 5, 7), (0, 9, 14), (1, 3, 15)):
      alone, last = mix(model, params, x[b : b + 1, a:e])
      close(y[b, a:e], alone[0], 1e-10)
      if e > 7:
        close(state.memory.w["w"][b], last.memory.w["w"][0], 1e-10)
        assert state.position_B[b] == last.position_B[0] == e - a


@pytest.mark.parametrize("cuts", [(6, 8, 14), tuple(range(1, 15))])
def test_packed_documents_in_any_calls(cuts):
  """Positions and decays continue through calls that documents begin in."""
  model = small()
  ids = jnp.asarray(PACKED, jnp.int32)
  with jax.enable_x64(True):
    params, x = generic(model), draw(2, 15, model.width)
    y, end = mix(model, params, x, ids)
    state, parts = retnet.init_state(params, 2, 0, model=model), []
    for a, b in zip((0, *cuts), (*cuts, 15)):
      part, state = mix(model, params, x[:, a:b], ids[:, a:b], state)
      parts.append(part)
    real = np.asarray(ids) > 0
    close(np.concatenate(parts, 1)[real], np.asarray(y)[real], 1e-10)
    close(state.memory.w["w"], end.memory.w["w"], 1e-10)
    np.testing.assert_array_equal(state.position_B, end.position_B)


def write(k, v, heads, chunk=64):
  """The memories [B,H,K,V] after keys and values [B,T,H,·]."""
  rule = retnet.Options(chunk=chunk).rule
  start = {"w": jnp.zeros((heads, k.shape[-1], v.shape[-1]))}
  decay = jnp.broadcast_to(retnet.log_retention(heads)[None, None], k.shape[:3])
  run = lambda k, v: linear.update(
    start, memory.chunked.start(start, k.shape[0], rule), k, k, v,
    memory.Gates(jnp.ones_like(decay), decay), rule=rule, at_edge=True,
  )[1]  # fmt: skip
  return np.asarray(jax.jit(run)(k, v).w["w"])


def test_a_repeated_pair_is_a_geometric_sum():
  """S_t = k^T v (1 - gamma^t) / (1 - gamma), and its limit (law 14)."""
  with jax.enable_x64(True):
    for T in (3, 1000):
      k, v = jnp.ones((1, T, 2, 2)), 2 * jnp.ones((1, T, 2, 3))
      S = write(k, v, heads=2)
      for h, gamma in enumerate((1 - 1 / 32, 1 - 1 / 64)):
        expected = 2 * (1 - gamma**T) / (1 - gamma)
        np.testing.assert_allclose(S[0, h], expected, rtol=1e-10)
  np.testing.assert_allclose(S[0, :, 0, 0], [64, 128], rtol=1e-6)


def test_memories_stay_below_their_bound():
  """|S| <= max |k| |v| / (1 - gamma_h) after 16k tokens (law 14)."""
  T, heads = 16_384, 4
  rng = np.random.default_rng(0)
  rows = [rng.standard_normal((T, heads, 4)), np.ones((T, heads, 4))]
  rows.append(np.repeat(rows[0][: T // 16], 16, axis=0))
  k = jnp.asarray(np.stack(rows), jnp.float32)
  v = jnp.concatenate([k[..., ::-1], k], axis=-1)
  S = write(k, v, heads)
  norm = lambda x: np.sqrt(np.square(x).sum(-1))
  gamma = 1 - 2.0 ** (-5 - np.arange(heads))
  bound = (norm(k) * norm(v)).max(axis=1) / (1 - gamma)
  size = np.sqrt(np.square(S).sum(axis=(2, 3)))
  assert (size <= 1.0001 * bound).all()
  np.testing.assert_allclose(size[1], bound[1], rtol=1e-3)  # Reached.


def test_the_rule_is_that_of_flash_linear_attention():
  frozen = _oracle.load("retnet")
  rule = retnet.Options(chunk=4).rule

  def run(x):
    start = {"w": jnp.zeros((3, 4, 8))}
    decay = jnp.broadcast_to(
      retnet.log_retention(3)[None, None], x["k"].shape[:3]
    )
    y, _, _ = linear.update(
      start, memory.chunked.start(start, 2, rule), x["q"] * 4**-0.5, x["k"],
      x["v"], memory.Gates(jnp.ones_like(decay), decay), rule=rule,
    )  # fmt: skip
    return (y * frozen["cotangent"]).sum(), y

  inputs = {n: jnp.asarray(frozen[n]) for n in "qkv"}
  run = jax.jit(jax.value_and_grad(run, has_aux=True))
  (_, y), grads = run(inputs)
  close(y, frozen["y"], 1e-5)
  for n in "qkv":
    close(grads[n], frozen[f"grad/{n}"], 1e-4)


def test_the_frozen_numbers_are_what_the_oracle_says():
  for package in ("torch", "fla"):
    pytest.importorskip(package)
  script = pytest.importorskip("tests.golden.retnet")
  frozen = _oracle.load("retnet")
  for name, array in script.make().items():
    close(array, frozen[name], 1e-5)


@pytest.mark.parametrize("size,total", [
  ("340m", 338.0), ("760m", 757.0), ("1b3", 1295.6),
])  # fmt: skip
def test_sizes_are_the_formula_and_the_table(size, total):
  """docs/mathematics.md 7.2, in millions."""
  config = build.resolve(named.load_config(f"retnet_{size}"))
  net = build.model(config)
  assert abs(net.parameter_count() / 1e6 - total) < 0.06
  assert net.head_dim == 256
  assert retnet.parameter_count(net) == 8 * net.width**2 + 512


def test_every_parameter_and_state_has_a_place_on_the_mesh():
  model = MODELS["retnet"]()
  mesh = sharding.mesh(fsdp=-1, tensor=2)
  params = jax.eval_shape(model.init, jax.random.key(0))
  state = jax.eval_shape(lambda p: model.init_state(p, 4, 8), params)
  places = sharding.param_shardings(params, mesh)["blocks"]["mixer"]
  assert places["w_g"].spec[1:] == ("fsdp", "tensor")
  fast = sharding.sequence_shardings(state, mesh).layers.memory.w["w"]
  assert fast.spec[2] == "tensor"


def test_the_state_has_one_size_and_the_card_says_it():
  model = MODELS["retnet"]()
  params = jax.eval_shape(model.init, jax.random.key(0))

  def size(length):
    start = lambda p: model.init_state(p, 1, length).layers
    leaves = jax.tree.leaves(jax.eval_shape(start, params))
    return sum(x.size * x.dtype.itemsize for x in leaves)

  assert not model.grows
  assert size(1) == size(4096) == model.levels()[0][0].state_bytes


def test_what_cannot_be_is_refused():
  with pytest.raises(
    ValueError, match="model.mixer.chunk must be a whole number from 1"
  ):
    retnet.Options(chunk=0)
  with pytest.raises(ValueError, match="head_dim must be even"):
    dataclasses.replace(small(), heads=4, head_dim=3)
  with pytest.raises(ValueError, match="has no model.mixer.momentum; it has"):
    lm.options("retnet", {"momentum": "ema"})
