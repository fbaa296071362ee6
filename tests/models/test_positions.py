"""Texts without end: rotary positions beyond 2^31, counters at their ends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax.models import layers, lm
from nl_jax.models import leaves as leaf
from nl_jax.models.mixers.attention import mixer as attention
from tests.laws.models import MODELS

_MAX = 2**31 - 1


def wrapped(position):
  """As an int32 counter holds it."""
  return jnp.asarray((position + 2**31) % 2**32 - 2**31, jnp.int32)


def turned(x, position):
  return layers.rope(x, wrapped(position).reshape(1, 1))


@pytest.mark.parametrize("far", [2**24 + 1, 2**31 - 3, 2**31 + 5, 2**32 - 2])
def test_rope_knows_a_distance_at_any_position(far):
  draw = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 64))
  q, k = jnp.asarray(draw, jnp.float32)
  dot = lambda p, s: float((turned(q, p) * turned(k, s)).sum())
  for distance in (0, 1, 5, 2000):
    there = dot(far, far - distance)
    np.testing.assert_allclose(there, dot(distance, 0), atol=2e-5)
  assert abs(dot(far, far - 1) - dot(far, far)) > 1e-2


@pytest.mark.parametrize("kind", layers.ROPE_SCALINGS)
def test_rope_turns_by_its_rates(kind):
  scaling = layers.RopeScaling(kind, 4.0, 1.0, 4.0, 64)
  rates = 500.0 ** (-np.arange(8) / 8)
  if kind == "linear":
    rates = rates / 4
  if kind == "llama3":
    kept = np.clip((64 * rates / (2 * np.pi) - 1) / 3, 0, 1)
    rates = kept * rates + (1 - kept) * rates / 4
  one = jnp.asarray(np.eye(16)[None, None, :8], jnp.float32)
  y = layers.rope(one, jnp.full((1, 1), 200, jnp.int32), 500.0, scaling)[0, 0]
  at = np.arange(8)
  np.testing.assert_allclose(y[at, at], np.cos(200 * rates), atol=1e-6)
  np.testing.assert_allclose(y[at, at + 8], np.sin(200 * rates), atol=1e-6)


def _moved(state, by):
  """A state at the start of a text, as if `by` tokens stood before it."""

  def move(path, x):
    own = jax.tree_util.keystr(path).endswith(".position_B")
    return x + by if own else x

  return jax.tree_util.tree_map_with_path(move, state)


@pytest.mark.parametrize(
  "name", ["transformer", "hope_attention_window", "samba", "titans_mag",
           "retnet"]
)  # fmt: skip
def test_a_layer_reads_on_beyond_two_billion_tokens(name):
  model = MODELS[name]()
  if name == "titans_mag":  # Persistent tokens stand at the text's begin.
    model = dataclasses.replace(
      model, mixer=dataclasses.replace(model.mixer, persistent=0)
    )
  params = leaf.drawn(model.module.leaves(model), jax.random.key(0))
  x = jnp.asarray(
    np.random.default_rng(1).standard_normal((1, 24, 64)), jnp.float32
  )

  @jax.jit
  def step(x, state):
    params_ = {"mixer": params, "mixer_norm": {"scale": jnp.ones((64,))}}
    return model.mix(params_, x, state, None)[:2]

  def read(by):
    state, out = model.module.init_state(params, 1, 24, model=model), []
    state = _moved(state, wrapped(by))
    for begin in (0, 12):
      y, state = step(x[:, begin : begin + 12], state)
      out.append(y)
    return np.concatenate(out, 1)

  near = read(0)
  for far in (2**31 - 10, 2**32 - 10):
    np.testing.assert_allclose(read(far), near, atol=2e-5)


def test_counters_stand_still_or_go_round():
  seen = jnp.asarray([3, 3], jnp.int32)
  before = jnp.asarray([5, _MAX - 1], jnp.int32)
  assert lm.counted(before, seen).tolist() == [8, _MAX]
  x = jnp.ones((1, 3, 1, 2))
  state = attention.empty(1, 4, 1, 2, jnp.float32)
  state = state._replace(
    document_B=jnp.full((1,), 2**30, jnp.int32), segment_B=jnp.ones((1,), int)
  )
  ids = jnp.asarray([[1, 2, 3]], jnp.int32)
  _, state = attention._attend(x, x, x, state, ids)
  assert state.slot_document_BxS.tolist() == [[2**30, 1, 2, 0]]
  for _ in range(2):
    _, state = attention._attend(x, x, x, state, ids)
  assert state.length_B.tolist() == [4]
