"""The laws of docs/architecture.md 5 for every model, in float64.

A new model joins with its row in `MODELS`. All laws of a model share its
compiled forward functions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from nl_jax import stream
from tests.laws.models import MODELS

T = 26  # Three chunks of 8 and an unfinished one.
VOCAB = 320


class Case:
  """One model, its perturbed parameters and its compiled functions.

  Compiles are what the laws cost: `fresh` is always called with [T, T] tokens,
  `call` with [2, 13] or [2, 1].
  """

  def __init__(self, name):
    self.model = MODELS[name]()
    self.start = jax.tree.map(
      lambda x: np.asarray(x, float),
      jax.jit(self.model.init)(jax.random.key(0)),
    )
    # A generic point: zeros and ones of the start would hide dead paths.
    noise = np.random.default_rng(0)
    self.params = jax.tree.map(
      lambda x: x + 0.02 * noise.standard_normal(x.shape), self.start
    )
    self._fresh = jax.jit(
      lambda p, tokens, ids: self.model.apply(p, tokens, segment_ids=ids)
    )
    self._call = jax.jit(
      lambda p, tokens, state, ids: self.model.apply(
        p, tokens, state, segment_ids=ids
      )
    )

  def tokens(self, batch, seed=0):
    return np.random.default_rng(seed).integers(3, 259, (batch, T))

  def fresh(self, params, tokens, ids=None):
    """(logits, state, metrics) of rows from the start, at most T of them."""
    ids = np.ones_like(tokens) if ids is None else ids
    rest = [(0, T - len(tokens)), (0, 0)]
    out = self._fresh(params, np.pad(tokens, rest), np.pad(ids, rest))
    return np.asarray(out[0])[: len(tokens)], out[1], out[2]

  def call(self, tokens, state, ids=None):
    """(logits, state) of two rows that resume from a state."""
    ids = np.ones_like(tokens) if ids is None else ids
    logits, state, _ = self._call(self.params, tokens, state, ids)
    return np.asarray(logits), state


@functools.cache
def case(name):
  return Case(name)


# Models whose laws are run with every Python.
VERSIONS = {"transformer", "hope_linear", "gated_deltanet"}


# One worker runs all laws of a model, which share its compiled functions.
def params_of(names):
  marks = lambda name: [
    pytest.mark.xdist_group(name),
    *([pytest.mark.versions] if name in VERSIONS else []),
  ]
  return [pytest.param(name, marks=marks(name)) for name in names]


@pytest.fixture(params=params_of(MODELS))
def law(request):
  with jax.enable_x64(True):
    yield case(request.param)


def close(x, y, tolerance=1e-10):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def test_nothing_is_dead(law):
  tokens = jnp.asarray(law.tokens(2))

  def loss(params):
    logits, _, _ = law.model.apply(params, tokens)
    targets = jnp.roll(tokens, -1, axis=1)[..., None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets, 2).mean()

  grads = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(law.params))
  for path, g in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path)
    if name == "['embed']":
      assert (g != 0).any()
    else:  # In every layer: leaves are stacked.
      layers = g.reshape(g.shape[0], -1) if "blocks" in name else g[None]
      assert (layers != 0).any(axis=1).all(), name


def test_causality_and_reach(law):
  """Row s has another token s: nothing before it moves, what follows does."""
  tokens = law.tokens(1).repeat(T, 0)
  moved = tokens.copy()
  moved[np.arange(T), np.arange(T)] += 1
  before = law.fresh(law.params, tokens)[0]
  after = law.fresh(law.params, moved)[0]
  for s in range(T):
    assert (before[s, :s] == after[s, :s]).all(), s
    assert (before[s, s] != after[s, s]).any(), s
  # Beyond the convolutions and one chunk: 8 + 4 * 2 layers.
  assert (before[0, 17:] != after[0, 17:]).any(axis=-1).all()


def test_isolation_of_rows(law):
  tokens = law.tokens(T)
  moved = tokens.copy()
  moved[0] = law.tokens(1, seed=1)[0]
  before = law.fresh(law.params, tokens)[0]
  after = law.fresh(law.params, moved)[0]
  assert (before[1:] == after[1:]).all()
  assert (before[0] != after[0]).any()


@pytest.mark.parametrize("cuts", [(13,), tuple(range(1, T))])
def test_any_split_equals_one_call(law, cuts):
  tokens = law.tokens(2)
  logits, whole, _ = law.fresh(law.params, tokens)
  state = law.model.init_state(law.params, 2, T)
  parts = []
  for a, b in zip((0, *cuts), (*cuts, T)):
    part, state = law.call(tokens[:, a:b], state)
    parts.append(part)
  close(np.concatenate(parts, 1), logits)
  same = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9)
  jax.tree.map(same, state, stream.take(whole, [0, 1]))


def test_rows_out_of_step(law):
  """Rows end at different tokens, and continue as if each were alone."""
  tokens = law.tokens(2)
  logits, _, _ = law.fresh(law.params, tokens)
  state = law.model.init_state(law.params, 2, T)
  position = np.zeros(2, int)
  for lengths in ((9, 13), (13, 2), (4, 11)):
    call, ids = np.zeros((2, 2, 13), int)
    for b, n in enumerate(lengths):
      call[b, :n], ids[b, :n] = tokens[b, position[b] :][:n], 1
    got, state = law.call(call, state, ids)
    for b, n in enumerate(lengths):
      close(got[b, :n], logits[b, position[b] :][:n])
      position[b] += n
  assert (np.asarray(state.position_B) == T).all()


def packed_rows(law):
  """A packed row of two documents, and each of them alone."""
  tokens = law.tokens(1)[0]
  first, start = 11, 16
  ids = np.zeros((3, T), int)
  ids[0, :first], ids[0, start:] = 1, 2
  ids[1, :first], ids[2, : T - start] = 1, 1
  rows = np.zeros((3, T), int)
  rows[0], rows[1, :first] = tokens, tokens[:first]
  rows[2, : T - start] = tokens[start:]
  return rows, ids, first, start


# To the others a row is one document: what they learn continues into the next.
PACKED = [n for n in MODELS if n != "hope_attention_incontext"]


@pytest.mark.parametrize("law", params_of(PACKED), indirect=True)
def test_packed_documents_equal_the_same_alone(law):
  assert 16 % law.model.alignment == 0
  rows, ids, first, start = packed_rows(law)
  logits, _, _ = law.fresh(law.params, rows, ids)
  close(logits[0, :first], logits[1, :first])
  close(logits[0, start:], logits[2, : T - start])
  moved = rows.copy()
  moved[0, :first] = law.tokens(1, seed=1)[0, :first]
  again, _, _ = law.fresh(law.params, moved, ids)
  assert (again[0, start:] == logits[0, start:]).all()


def test_padding_changes_nothing_before_it(law):
  rows, ids, first, _ = packed_rows(law)
  logits, state, metrics = law.fresh(law.params, rows, ids)
  unpadded, _, _ = law.fresh(law.params, rows[:1])
  close(logits[1, :first], unpadded[0, :first])
  rows[1:, 18:] = 77  # What stands in the padding is never seen.
  again, other, counted = law.fresh(law.params, rows, ids)
  assert (again[1, :first] == logits[1, :first]).all()
  same = lambda x, y: np.testing.assert_array_equal(x, y)
  jax.tree.map(same, (state, metrics), (other, counted))


def test_untrained_loss_is_that_of_a_uniform_guess(law):
  tokens = law.tokens(T)
  logits, _, _ = law.fresh(law.start, tokens)
  logits, targets = np.asarray(logits), np.roll(tokens, -1, 1)[..., None]
  nats = scipy.special.logsumexp(logits, -1, keepdims=True) - logits
  loss = np.take_along_axis(nats, targets, 2).mean()
  np.testing.assert_allclose(loss, np.log(VOCAB), rtol=0.05)
