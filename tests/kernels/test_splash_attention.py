"""Splash attention, interpreted, against dense masked attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax import sharding
from nl_jax.kernels import splash_attention
from nl_jax.models import leaves as leaf
from nl_jax.models.mixers.attention import mixer as attention
from nl_jax.models.mixers.attention import softmax
from tests.laws.models import MODELS

T = 128


def draw(*shape, seed):
  made = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(made, jnp.float32)


def inputs(batch=2, heads=4, kv_heads=2):
  q = draw(batch, T, heads, 16, seed=0)
  return q, *(draw(batch, T, kv_heads, 16, seed=i) for i in (1, 2))


def close(x, y, tolerance):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("window", [0, 40])
def test_values_and_gradients_are_those_of_a_dense_mask(window):
  ids = np.ones((2, T), np.int32)
  ids[0, 77:], ids[1, :5], ids[1, 120:] = 2, 0, 0
  back = np.arange(T)[:, None] - np.arange(T)[None]
  mask = (back >= 0) & (back < (window or T))
  mask = jnp.asarray(mask[None] & (ids[:, :, None] == ids[:, None]))[:, None]

  @jax.jit
  def both(*x):
    fast = lambda *x: splash_attention.splash_attention(
      *x, ids, window=window, interpret=True
    )
    made, back = jax.vjp(fast, *x)
    same, dense_back = jax.vjp(lambda *x: softmax.attention(*x, mask), *x)
    return made, same, back(same), dense_back(same)

  made, same, grads, dense_grads = both(*inputs())
  close(made, same, 1e-5)
  for g, other in zip(grads, dense_grads):
    close(g, other, 1e-5)


@pytest.mark.parametrize("window", [0, 40])
def test_a_layer_is_the_same_either_way(window):
  """Packed documents, padding before, between and after them; on a mesh."""
  model = MODELS["hope_attention"]()
  options = attention.Options(window=window, kv_heads=2)
  model = dataclasses.replace(model, mixer=options)
  params = leaf.drawn(attention.leaves(model), jax.random.key(0))
  ids = np.ones((4, T), np.int32)
  ids[0, :50], ids[0, 50:60], ids[1, :9], ids[1, 99:], ids[2, 64:] = (
    3,
    0,
    0,
    0,
    2,
  )
  x = draw(4, T, model.width, seed=0)

  def run(implementation):
    memory = dataclasses.replace(options, implementation=implementation)
    made = dataclasses.replace(model, mixer=memory)
    f = lambda p, x: attention.apply(p, x, None, ids, model=made)[:2]
    return jax.jit(f)(params, x)

  plain, state = run("xla")
  mesh = sharding.mesh(fsdp=4, tensor=2)
  with jax.set_mesh(mesh):
    fast, fast_state = run("pallas_interpret")
  close(fast, plain, 1e-5)
  for mine, other in zip(fast_state, state):
    np.testing.assert_allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("window", [0, 300])
def test_queries_of_a_row_are_split(window):
  """Documents and windows across devices; gradients of keys come back."""
  ids = np.ones((2, 4 * T), np.int32)
  ids[0, 200:], ids[1, :5] = 2, 0
  x = [jnp.concatenate([x] * 4, axis=1) * 0.5 for x in inputs(2, 2, 2)]
  spec = sharding.spec("batch", "length", "heads", "head_dim")

  def both(*x):
    run = lambda *x: splash_attention.splash_attention(
      *x, ids, window=window, spec=spec, interpret=True
    )
    made, back = jax.vjp(run, *x)
    return made, back(jnp.sin(made))

  alone = jax.jit(both)(*x)
  with jax.set_mesh(sharding.mesh(fsdp=2, sequence=4)):
    split = jax.jit(both)(*x)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), split, alone)


def test_on_a_cpu_nothing_is_chosen():
  q, k, _ = inputs()
  assert softmax.kernel(q, k, "auto") is None
  assert softmax.kernel(q, k, "xla") is None


@pytest.mark.parametrize("implementation,change,message", [
  ("pallas_tpu", {}, "it needs a TPU, got the platform 'cpu'"),
  ("pallas_interpret", dict(tokens=100), "multiple of 128 tokens, got 100; "
   "nearest: 128"),
  ("pallas_interpret", dict(dtype=jnp.float16), "got float16"),
  ("pallas_interpret", dict(mesh=dict(tensor=8)), "4 heads do not divide over"),
  ("pallas_interpret", dict(mesh=dict(tensor=4)), "2 heads of keys do not"),
  ("pallas_interpret", dict(mesh=dict(fsdp=8)), "2 rows do not divide over 8"),
  ("pallas_interpret", dict(mesh=dict(fsdp=2, sequence=4)),
   "multiple of 512 tokens over 4 devices of mesh.sequence, got 128"),
])  # fmt: skip
def test_what_cannot_run_says_why(implementation, change, message):
  size = change.get("tokens", T)
  shape = lambda heads: jax.ShapeDtypeStruct(
    (2, size, heads, 16), change.get("dtype", jnp.float32)
  )
  mesh = sharding.mesh(**change.get("mesh", {}))
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
    softmax.kernel(shape(4), shape(2), implementation)


def test_an_implementation_that_there_is_not_is_refused():
  with pytest.raises(ValueError, match="must be one of auto, xla, pallas_tpu"):
    attention.Options(implementation="triton")
