"""cuDNN's attention: what is asked of it, and when; none runs without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax import sharding
from nl_jax.kernels import cudnn_attention, placement
from nl_jax.models.mixers.attention import softmax

T = 64
SHAPES = dict(rows=4, tokens=T, heads=4, kv_heads=2, head_dim=16)


def draw(heads, seed):
  made = np.random.default_rng(seed).normal(size=(4, T, heads, 16))
  return jnp.asarray(made, jnp.bfloat16)


@pytest.fixture
def on_a_gpu(monkeypatch):
  """Shapes are judged as on a GPU; the library's own form does the work."""
  library, asked = jax.nn.dot_product_attention, []

  def instead(*args, **kw):
    asked.extend([kw.pop("implementation")] if "implementation" in kw else [])
    return library(*args, **kw)

  monkeypatch.setattr(placement, "platform", lambda: "gpu")
  monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
  return asked


@pytest.mark.parametrize("mesh", [{}, dict(fsdp=4, tensor=2)])
@pytest.mark.parametrize("window", [0, 20])
def test_the_masks_are_those_of_dense_attention(on_a_gpu, window, mesh):
  q, k, v = draw(4, 0), draw(2, 1), draw(2, 2)
  ids = np.ones((4, T), np.int32)
  ids[0, 37:], ids[1, :5], ids[2, 60:] = 2, 0, 0
  back = np.arange(T)[:, None] - np.arange(T)[None]
  seen = (back >= 0) & (back < (window or T))
  seen = seen[None] & (ids[:, :, None] == ids[:, None])
  wide = (x.astype(jnp.float32) for x in (q, k, v))
  expected = softmax.attention(*wide, jnp.asarray(seen)[:, None])
  devices = None if mesh else jax.devices()[:1]
  with jax.set_mesh(sharding.mesh(**mesh, devices=devices)):
    assert softmax.kernel(q, k, "auto") == "cudnn"
    made = jax.jit(
      lambda *x: softmax.fused_attention(*x, jnp.asarray(ids), window, "cudnn")
    )(q, k, v)
  assert set(on_a_gpu) == {"cudnn"}
  np.testing.assert_allclose(
    made.astype(jnp.float32), expected, rtol=0, atol=0.03
  )


@pytest.mark.parametrize("change,mesh,message", [
  (dict(dtype=jnp.float32), {}, "takes bfloat16 or float16, got float32"),
  (dict(head_dim=20), {}, "multiple of 8 features, at most 128, got 20"),
  (dict(head_dim=256), {}, "at most 128, got 256"),
  (dict(tokens=63), {}, "even number of tokens, got 63"),
  ({}, dict(fsdp=8), "4 rows do not divide over 8"),
  ({}, dict(tensor=4, fsdp=2), "2 heads of keys do not"),
  ({}, dict(sequence=8), "neither the tokens of a row"),
])  # fmt: skip
def test_what_is_not_taken_is_a_sentence(on_a_gpu, change, mesh, message):
  sizes = SHAPES | {k: v for k, v in change.items() if k != "dtype"}
  shape = lambda heads: jax.ShapeDtypeStruct(
    (sizes["rows"], sizes["tokens"], sizes[heads], sizes["head_dim"]),
    change.get("dtype", jnp.bfloat16),
  )
  q, k = shape("heads"), shape("kv_heads")
  devices = None if mesh else jax.devices()[:1]
  with jax.set_mesh(sharding.mesh(**mesh, devices=devices)):
    assert softmax.kernel(q, k, "auto") is None
    with pytest.raises(ValueError, match=message):
      softmax.kernel(q, k, "cudnn")


def test_it_needs_a_gpu():
  q, k = draw(4, 0), draw(2, 1)
  with pytest.raises(ValueError, match="needs an NVIDIA GPU, got the platform"):
    cudnn_attention.cudnn_attention(q, k, k)
