"""Mamba against a token loop, closed forms and transformers' layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax.models import layers
from nl_jax.models.mixers import mamba
from tests.golden import _oracle

D, N = 8, 4


def generic(seed=0, scale=0.3, width=D):
  """Float64 parameters of one layer, none of them at a special value."""
  params = mamba.init(jax.random.key(seed), width, 2, N)
  rng = np.random.default_rng(seed)
  move = lambda x: np.asarray(x, float) + scale * rng.standard_normal(x.shape)
  return jax.tree.map(lambda x: jnp.asarray(move(x)), params)


def mix(params, x, ids=None, state=None, chunk=4):
  run = lambda p, x, s, ids: mamba.apply(p, x, s, ids, chunk=chunk)
  return jax.jit(run)(params, x, state, ids)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def close(x, y, tolerance):
  y = np.asarray(y)
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def token_loop(params, u_TxD):
  """A layer from its definition (docs/mathematics.md 6): y and the last h."""
  p = jax.tree.map(np.asarray, params)
  silu = lambda z: z / (1 + np.exp(-z))
  R = p["w_dt"].shape[0]
  inputs = u_TxD @ p["w_x"]
  h = np.zeros(p["A_log"].shape)
  out = np.zeros_like(u_TxD)
  for t, u in enumerate(u_TxD):
    taps = [p["conv_x"][3 - j] * inputs[t - j] for j in range(4) if j <= t]
    x = silu(sum(taps) + p["b_x"])
    r, B, C = np.split(x @ p["w_dbc"], [R, R + N])
    dt = np.log1p(np.exp(r @ p["w_dt"] + p["b_dt"]))
    for i in range(len(x)):
      for n in range(N):
        a = np.exp(-dt[i] * np.exp(p["A_log"][i, n]))
        h[i, n] = a * h[i, n] + dt[i] * x[i] * B[n]
    y = h @ C + p["D_skip"] * x
    out[t] = (y * silu(u @ p["w_z"])) @ p["w_o"]
  return out, h


def test_a_layer_is_its_token_loop():
  with jax.enable_x64(True):
    params, x = generic(width=20), draw(2, 11, 20)
    assert params["w_dt"].shape == (2, 40)  # R is rounded up.
    y, state = mix(params, x)
    for b in range(2):
      expected, h = token_loop(params, np.asarray(x[b]))
      close(y[b], expected, 1e-10)
      close(state.h_BxIxN[b], h, 1e-10)


def test_the_chunk_is_no_part_of_the_function():
  """Values and gradients; a chunk longer than the text is the text."""
  with jax.enable_x64(True):
    params, x = generic(), draw(2, 21, D)

    def run(chunk):
      loss = lambda p, x: jnp.sin(mamba.apply(p, x, None, None, chunk=chunk)[0])
      total = lambda p, x: loss(p, x).sum()
      return jax.jit(jax.value_and_grad(total, (0, 1)))(params, x)

    first = run(1)
    for chunk in (4, 64):
      jax.tree.map(lambda a, b: close(a, b, 1e-10), run(chunk), first)


# Two documents, padding between and after; the second row is one document
# that begins late.
PACKED = [
  [1] * 5 + [2] * 2 + [0] * 2 + [3] * 5 + [0],
  [0] * 3 + [7] * 12,
]


def test_documents_begin_anywhere():
  with jax.enable_x64(True):
    params, x = generic(), draw(2, 15, D)
    y, state = mix(params, x, jnp.asarray(PACKED, jnp.int32))
    for b, a, e in ((0, 0, 5), (0, 5, 7), (0, 9, 14), (1, 3, 15)):
      alone, last = mix(params, x[b : b + 1, a:e])
      close(y[b, a:e], alone[0], 1e-10)
      if e > 7:
        close(state.h_BxIxN[b], last.h_BxIxN[0], 1e-10)


@pytest.mark.parametrize("cuts", [(6, 8, 14), tuple(range(1, 15))])
def test_packed_documents_in_any_calls(cuts):
  ids = jnp.asarray(PACKED, jnp.int32)
  with jax.enable_x64(True):
    params, x = generic(), draw(2, 15, D)
    y, end = mix(params, x, ids)
    state, parts = mamba.init_state(params, 2, x.dtype), []
    for a, b in zip((0, *cuts), (*cuts, 15)):
      part, state = mix(params, x[:, a:b], ids[:, a:b], state)
      parts.append(part)
    real = np.asarray(ids) > 0
    close(np.concatenate(parts, 1)[real], np.asarray(y)[real], 1e-10)
    close(state.h_BxIxN, end.h_BxIxN, 1e-10)


def test_padding_is_an_exact_no_op():
  params, x = generic(), draw(1, 9, D).astype(jnp.float32)
  params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
  _, state = mix(params, x)
  padding = jnp.zeros((1, 7), jnp.int32)
  _, after = mix(params, 1e3 * x[:, :7], padding, state)
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_a_constant_input_has_a_closed_form():
  """h = (1 - a^t) / (1 - a) dt x B; a channel's start: a = exp(-n dt)."""
  T = 500
  with jax.enable_x64(True):
    start = mamba.init(jax.random.key(0), D, 2, N)
    params = jax.tree.map(lambda p: jnp.asarray(p, float), start)
    np.testing.assert_allclose(
      np.exp(params["A_log"][0]), np.arange(1, N + 1), rtol=1e-6
    )
    dt = np.log1p(np.exp(params["b_dt"]))
    assert (dt > 0.99e-3).all() and (dt < 0.101).all()
    params["w_dt"] = 0 * params["w_dt"]
    params["conv_x"] = params["conv_x"].at[:3].set(0.0)
    u = jnp.broadcast_to(draw(1, 1, D), (1, T, D))
    _, state = mix(params, u, chunk=64)
    x = u[0, 0] @ params["w_x"] * params["conv_x"][3]
    x = np.asarray(jax.nn.silu(x))
    B = (x @ params["w_dbc"])[1 : 1 + N]
    a = np.exp(-dt[:, None] * np.arange(1, N + 1)[None])
    expected = (1 - a**T) / (1 - a) * (dt * x)[:, None] * B[None]
    close(state.h_BxIxN[0], expected, 1e-6)


def test_memories_stay_below_their_bound():
  """|h| <= max |x| max |B| max dt / (1 - a), a = exp(-n dt) (law 14)."""
  T = 16_384
  params = mamba.init(jax.random.key(0), D, 2, N)
  rng = np.random.default_rng(0)
  rows = [rng.standard_normal((T, D)), np.ones((T, D))]
  rows.append(np.repeat(rows[0][: T // 16], 16, axis=0))
  u = jnp.asarray(np.stack(rows), jnp.float32)
  y, state = mix(params, u, chunk=128)
  assert np.isfinite(y).all()
  x, _ = layers.conv_apply(params["conv_x"], u @ params["w_x"])
  x = np.asarray(jax.nn.silu(x))
  r, B, _ = np.split(x @ np.asarray(params["w_dbc"]), [1, 1 + N], axis=-1)
  step = r @ np.asarray(params["w_dt"]) + np.asarray(params["b_dt"])
  dt = np.log1p(np.exp(step))
  # Three tokens fill the convolution; 16k later they are forgotten.
  most = lambda z: np.abs(z[:, 3:]).max(axis=1)
  size = most(x)[:, :, None] * most(B)[:, None]
  longest = most(dt)[..., None]
  bound = size * longest / -np.expm1(-longest * np.arange(1, N + 1))
  h = np.abs(np.asarray(state.h_BxIxN))
  assert (h <= 1.001 * bound).all()
  np.testing.assert_allclose(h[1], bound[1], rtol=1e-3)  # Reached.


def test_states_are_float32_under_bfloat16():
  params = mamba.init(jax.random.key(0), D, 2, N)
  x = draw(2, 12, D).astype(jnp.float32)
  y, state = mix(params, x)
  short, other = mix(params, x.astype(jnp.bfloat16))
  assert short.dtype == other.convs["x"].inputs_Bx3xE.dtype == jnp.bfloat16
  assert other.h_BxIxN.dtype == jnp.float32
  close(short.astype(jnp.float32), y, 2e-2)
  close(other.h_BxIxN, state.h_BxIxN, 3e-2)


def test_states_are_there_for_one_chunk_at_a_time():
  """Temporaries of the gradient, against [B,T,I,N] of all tokens at once."""
  T, width, N = 256, 32, 64
  params = jax.eval_shape(lambda: mamba.init(jax.random.key(0), width, 2, N))
  x = jax.ShapeDtypeStruct((1, T, width), jnp.float32)

  def temporary(chunk):
    loss = lambda p, x: mamba.apply(p, x, None, None, chunk=chunk)[0].sum()
    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  states = T * 2 * width * N * 4
  assert temporary(4) < 0.8 * states < 8 * states < temporary(T)


def test_the_layer_is_that_of_transformers():
  """Theirs rounds decays and writes to float32."""
  frozen = _oracle.load("mamba")
  names = [k.removeprefix("grad/") for k in frozen if k.startswith("grad/")]

  def run(tree):
    params = {n: w for n, w in tree.items() if n != "x"}
    y, _ = mamba.apply(params, tree["x"], None, None, chunk=8)
    return (y * frozen["cotangent"]).sum(), y

  with jax.enable_x64(True):
    tree = {n: jnp.asarray(frozen[n]) for n in names}
    (_, y), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(tree)
    close(y, frozen["y"], 1e-6)
    for n in names:
      close(grads[n], frozen[f"grad/{n}"], 1e-6)


def test_the_frozen_numbers_are_what_the_oracle_says():
  for package in ("torch", "transformers"):
    pytest.importorskip(package)
  script = pytest.importorskip("tests.golden.mamba")
  frozen = _oracle.load("mamba")
  for name, array in script.make().items():
    close(array, frozen[name], 1e-6)


@pytest.mark.parametrize("width", [8, 20, 64])
def test_the_size_is_the_formula(width):
  params = mamba.init(jax.random.key(0), width, 2, N)
  count = sum(x.size for x in jax.tree.leaves(params))
  assert count == mamba.parameter_count(width, N)
  R = -(-width // 16)
  assert count == 6 * width**2 + 2 * width * (2 * R + 3 * N + 7)
