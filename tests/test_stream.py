"""A stream says what one call over all its tokens says."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nl_jax import sharding, stream
from nl_jax.stream import drift
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


@pytest.fixture(scope="module")
def reader_of():
  net = MODELS["hope"]()
  params = net.init(jax.random.key(0))
  return lambda rows: stream.start(net, params, batch_size=rows)


def text(rows, length=96):
  return np.random.default_rng(1).integers(3, 259, (rows, length))


def test_a_memory_is_rolled_back_to_a_point(reader_of):
  tokens, reader = text(1), reader_of(1)
  reader.read(tokens[:, :32])
  reader.mark("early", {"page": 3})
  first = reader.score(tokens[:, 32:64])
  assert reader.drift("early")[0] > 0
  point = reader.roll_back("early")
  assert point.about == {"page": 3} and reader.drift("early")[0] == 0
  np.testing.assert_array_equal(first, reader.score(tokens[:, 32:64]))


def test_a_row_beyond_its_bound_writes_no_more(reader_of, caplog):
  tokens = text(2)
  free, bounded = reader_of(2), reader_of(2)
  moved = []
  for reader in (free, bounded):
    reader.mark("start")
    if moved:
      # Beyond what the first row has moved by half of the text.
      bounded.bound(float(moved[2][0]) * 1.001, "start")
    for at in range(0, 96, 16):
      if at == 48:
        # The first row reads one token over and over.
        tokens[0, at:] = 7
      reader.read(tokens[:, at : at + 16])
      moved.append(reader.drift("start"))
  limit = moved[2][0] * 1.001
  after = np.stack(moved[6:])
  assert (after <= limit).all() and bounded.stopped_B.any()
  stopped = np.flatnonzero(bounded.stopped_B)
  assert f"row {stopped[0]}: its memory has moved by" in caplog.text
  # It is told once, and the text is read on.
  assert caplog.text.count(f"row {stopped[0]}:") == 1
  np.testing.assert_array_equal(bounded.state.position_B, [96, 96])
  held = bounded.state.layers.memory.memory.w["w_in"][:, stopped[0]]
  bounded.read(tokens[:, :16])
  np.testing.assert_array_equal(
    held, bounded.state.layers.memory.memory.w["w_in"][:, stopped[0]]
  )
  bounded.roll_back("start")
  assert not bounded.stopped_B.any()


def test_what_cannot_be_bounded_is_refused(reader_of):
  reader = reader_of(1)
  with pytest.raises(ValueError, match="has no point 'x'; it has: none"):
    reader.roll_back("x")
  reader.mark("a")
  for limit in (0.0, -1.0, float("nan")):
    with pytest.raises(ValueError, match="must be above 0"):
      reader.bound(limit, "a")
  net = MODELS["hope_attention_window"]()
  other = stream.start(net, net.init(jax.random.key(0)))
  other.mark("a")
  with pytest.raises(ValueError, match="has no fast weights to bound"):
    other.bound(1.0, "a")


@pytest.mark.parametrize("name", [n for n in MODELS if n != "transformer"])
def test_what_writes_is_known_of_every_model(name):
  """Every leaf is a fast weight, or follows the text by its name."""
  net = MODELS[name]()
  state = jax.eval_shape(
    lambda key: net.init_state(net.init(key), 2), jax.random.key(0)
  )
  follows = (
    r".*((convs|recall|cache|buffer)/.*|(keys|values|slot_document)_\w+|_B|"
    r"segment|segment/phase)"
  )
  names = [
    sharding.path_name(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state)
  ]
  rest = [x for x in names if not drift.WRITTEN.fullmatch(x)]
  assert [x for x in rest if not re.fullmatch(follows, x)] == []
  has = drift.has_memory(state)
  assert has == (
    not name.startswith("hope_attention")
    or "context" in name
    or "local" in name
  )


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
