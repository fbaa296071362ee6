"""A stream says what one call over all its tokens says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nl_jax import sharding, stream
from tests.laws.models import MODELS


@pytest.fixture(scope="module", params=["transformer", "hope"])
def model(request):
  net = MODELS[request.param]()
  return net, net.init(jax.random.key(0))


def test_pieces_equal_one_call(model):
  net, params = model
  tokens = np.random.default_rng(0).integers(3, 259, (2, 35))
  reader = stream.start(net, params, batch_size=2)
  for a, b in ((0, 19), (19, 20), (20, 35)):
    logits = reader.read(tokens[:, a:b])
  whole, _, _ = jax.jit(net.apply)(params, tokens)
  np.testing.assert_allclose(logits, whole[:, -1], atol=2e-5)


def test_cached_sampling_equals_uncached(model):
  net, params = model
  prompt = np.array([[10, 20, 30]])
  reader = stream.start(net, params)
  reader.read(prompt)
  drawn = reader.sample(6, vocab_size=259, temperature=0.0)
  got = [int(ids[0]) for ids in drawn]
  tokens, apply = prompt, jax.jit(net.apply)
  for _ in range(6):
    padded = np.pad(tokens, [(0, 0), (0, 12 - tokens.shape[1])])
    ids = np.arange(12)[None] < tokens.shape[1]
    logits, _, _ = apply(params, padded, segment_ids=ids.astype(np.int32))
    best = int(jnp.argmax(logits[0, tokens.shape[1] - 1, :259]))
    tokens = np.append(tokens, [[best]], axis=1)
  assert got == tokens[0, 3:].tolist()


def test_seed_temperature_and_nucleus(model):
  net, params = model

  def draw(**options):
    reader = stream.start(net, params)
    reader.read(np.array([[10, 20, 30]]))
    drawn = reader.sample(8, vocab_size=259, **options)
    return [int(ids[0]) for ids in drawn]

  assert draw(seed=1) == draw(seed=1) != draw(seed=2)
  assert draw(top_p=1e-6, seed=1) == draw(temperature=0.0)
  assert max(draw(seed=3, temperature=100.0)) < 259


def test_a_full_attention_cache_is_refused():
  net = MODELS["transformer"]()
  params = net.init(jax.random.key(0))
  reader = stream.start(net, params, length=4)
  reader.read(np.zeros((1, 3), int))
  with pytest.raises(ValueError, match="room for 4 tokens, got 2 more after 3"):
    reader.read(np.zeros((1, 2), int))


def test_mistakes(model):
  net, params = model
  reader = stream.start(net, params)
  with pytest.raises(ValueError, match="must read a token"):
    next(reader.sample(1, vocab_size=259))
  with pytest.raises(ValueError, match="no token"):
    reader.read(np.zeros((1, 0), int))
  reader.read(np.zeros((1, 1), int))
  with pytest.raises(ValueError, match="top_p in"):
    next(reader.sample(1, vocab_size=259, top_p=0.0))


def test_on_a_mesh_it_says_the_same(model):
  """Weights over `tensor`, whole in every shard of the rows."""
  net, params = model
  tokens = np.random.default_rng(0).integers(3, 259, (2, 3))
  mesh = sharding.mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
  apart = stream.start(net, params, batch_size=2, mesh=mesh)
  alone = stream.start(net, params, batch_size=2)
  np.testing.assert_allclose(apart.read(tokens), alone.read(tokens), atol=2e-5)
  w = apart.params["blocks"]["cms"][net.cms.levels[0]]["w_gate"]
  assert w.sharding.spec == P(None, None, "tensor")
  # One row is of all: four heads on four of eight devices.
  assert stream.mesh_of(net, params, jax.devices()).size == 4


@pytest.mark.parametrize("name", ["hope_linear", "gated_deltanet", "rwkv7"])
def test_weights_for_decoding_change_no_number(name):
  """Matrices are read in the type of the activations by all models."""
  net = dataclasses.replace(MODELS[name](), dtype="bfloat16")
  params = net.init(jax.random.key(0))
  short = stream.for_decoding(net, params)
  assert short["embed"].dtype == jnp.bfloat16
  assert short["final_norm"]["scale"].dtype == jnp.float32
  run = lambda p: net.apply(p, jnp.array([[5], [6]]), net.init_state(p, 2, 4))
  whole, decoding = jax.jit(run)(params), jax.jit(run)(short)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(decoding)):
    np.testing.assert_array_equal(a, b)
