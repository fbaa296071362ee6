"""Scores against one plain call a row; padding, order, devices, state."""

import dataclasses
import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax import sharding
from nl_jax.data import tokenizers
from nl_jax.eval import encoding, evaluate, scoring
from nl_jax.models.incontext import model as incontext
from tests.eval import documents
from tests.laws.models import MODELS

ROOT = pathlib.Path(__file__).parents[2]
VOCAB = 259
# One of each way to remember.
ARCHS = ("transformer", "hope", "titans_lmm", "gated_deltanet")


@functools.cache
def made(name):
  model = MODELS[name]()
  return model, model.init(jax.random.key(0))


def mesh(devices=1):
  return sharding.mesh(devices=jax.devices()[:devices])


def pairs(lengths=((5, 3), (1, 9), (20, 2), (12, 13), (3, 1)), seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda n: rng.integers(3, VOCAB, n).astype(np.int32)
  return [(draw(a), draw(b)) for a, b in lengths]


def scorer(name="hope", devices=1, **options):
  return scoring.Scorer(made(name)[0], VOCAB, mesh(devices), **options)


def plain(model, params, pair):
  """The definition: one row, no padding, log-softmax of known ids."""
  tokens = np.concatenate(pair)
  logits, _, _ = jax.jit(model.apply)(params, tokens[None, :-1])
  logs = np.asarray(jax.nn.log_softmax(logits[0, :, :VOCAB], axis=-1))
  asked = np.arange(len(pair[0]) - 1, len(tokens) - 1)
  best = logs[asked].argmax(-1)
  return float(logs[asked, pair[1]].sum()), bool((best == pair[1]).all())


def assert_close(a, b, rtol=1e-5):
  np.testing.assert_allclose(a.lls, b.lls, rtol=rtol)
  assert a.is_greedy == b.is_greedy


def test_scores_are_those_of_one_row_alone():
  """In a bucket of 64, so with dummies below and padding after."""
  model, params = made("transformer")
  rows = pairs(((5, 8), (1, 12), (12, 1)))
  found = scorer("transformer")(params, rows)
  expected = [plain(model, params, pair) for pair in rows]
  np.testing.assert_allclose(found.lls, [x for x, _ in expected], rtol=1e-5)
  assert found.is_greedy == [x for _, x in expected]


@pytest.mark.parametrize("name", ARCHS)
def test_padding_changes_no_score(name):
  """Alone, and padded by three chunks beside a row that is not."""
  model, params = made(name)
  row, longer = pairs(((12, 9), (20, 25)))
  score = jax.jit(functools.partial(scoring.score, model, VOCAB, "none"))
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: x.astype(float), params)
    alone, _ = plain(model, wide, row)
    batch = scoring._batch([0, 1], [row, longer], 2, 44)
    lls, _ = score(wide, *batch[1:])
  np.testing.assert_allclose(lls[0], alone, rtol=1e-10)


def test_greedy_by_hand():
  """A model that always says token 5 next, at any place."""

  class Says5:
    vocab_size = 320

    def apply(self, params, tokens, *, segment_ids, learn):
      logits = jnp.zeros((*tokens.shape, 320)).at[..., 5].set(2.0)
      return logits.at[..., 300].set(9.0), None, {}  # Beyond the tokenizer.

  batch = scoring._batch(
    [0, 1, 2],
    [(np.array([7]), np.array(x)) for x in ([5, 5], [5, 6], [6, 5])],
    4, 8,
  )  # fmt: skip
  lls, greedy = scoring.score(Says5(), VOCAB, "none", {}, *batch[1:])
  assert greedy.tolist() == [True, False, False, True]
  right = 2 - np.log(np.exp(2) + VOCAB - 1)
  np.testing.assert_allclose(lls[0], 2 * right, rtol=1e-6)
  np.testing.assert_allclose(lls[1], 2 * right - 2, rtol=1e-6)
  assert lls[3] == 0


def test_chance_is_what_it_must_be(tmp_path):
  """Logits that are all 0, and weights that were never trained."""
  model, params = made("transformer")
  documents.write(tmp_path, ["wikitext"])
  protocol = encoding.Protocol(96, 96, prefix_id=1)
  one = evaluate.prepare("wikitext", tmp_path, tokenizers.Bytes(), protocol)
  score = scorer("transformer")
  zero = jax.tree.map(jnp.zeros_like, params)
  found, _ = evaluate.direct(one, lambda pairs: score(zero, pairs))
  tokens = sum(row.about["tokens"] for row in one.rows.rows)
  words = sum({r.about["doc_id"]: r.about["words"]
               for r in one.rows.rows}.values())  # fmt: skip
  assert found["token_perplexity"] == pytest.approx(VOCAB, rel=1e-5)
  nats = tokens / words * np.log(VOCAB)
  assert np.log(found["word_perplexity"]) == pytest.approx(nats, rel=1e-6)
  found, _ = evaluate.direct(one, lambda pairs: score(params, pairs))
  assert VOCAB / 2 < found["token_perplexity"] < VOCAB * 2


def test_order_batches_and_devices_change_no_score():
  model, params = made("transformer")
  rows = pairs([(n, 1 + n % 7) for n in range(1, 90, 4)])
  whole = scorer("transformer")(params, rows)
  assert scorer("transformer").shapes == set()
  order = np.random.default_rng(0).permutation(len(rows))
  mixed = scorer("transformer")(params, [rows[i] for i in order])
  for place, i in enumerate(order):
    assert mixed.lls[place] == pytest.approx(whole.lls[i], rel=1e-5)
  small = scorer("transformer", batch_tokens=1)
  assert_close(small(params, rows), whole)
  assert {batch for batch, _ in small.shapes} == {1}
  many = scorer("transformer", devices=8)
  sharded = jax.device_put(params, sharding.param_shardings(params, mesh(8)))
  assert_close(many(sharded, rows), whole)
  assert all(batch % 8 == 0 for batch, _ in many.shapes)


def test_nothing_stays_from_row_to_row():
  """The same row twice, after others, and in a second call."""
  _, params = made("hope")
  before = jax.tree.map(np.array, params)
  row, *others = pairs()
  score = scorer("hope", batch_tokens=64)  # A row a batch.
  first = score(params, [row, *others, row])
  assert first.lls[0] == first.lls[-1]
  assert score(params, [row]).lls[0] == first.lls[0]
  jax.tree.map(np.testing.assert_array_equal, before, params)


def test_buckets_are_whole_chunks_and_few():
  score = scorer("hope", batch_tokens=1024)
  assert score._padded(1) == 64 and score._padded(65) == 128
  assert score._padded(5000) == 8192
  assert score._batch_size(64, 100) == 16 and score._batch_size(64, 3) == 4
  assert score._batch_size(4096, 100) == 1
  told = []
  score(made("hope")[1], pairs(), lambda *seen: told.append(seen))
  assert told[-1] == (5, 5)
  assert score.shapes == {(8, 64)}


@pytest.mark.parametrize("memorise", scoring.MEMORISE)
def test_only_the_prompt_is_ever_learned(memorise):
  seen = {}

  class Learner:
    vocab_size = VOCAB

    def apply(self, params, tokens, *, segment_ids, learn):
      seen["learn"] = np.asarray(learn)
      return jnp.zeros((*tokens.shape, VOCAB)), None, {}

  batch = scoring._batch([0], [(np.arange(4), np.arange(3))], 2, 8)
  scoring.score(Learner(), VOCAB, memorise, {}, *batch[1:])
  # Tokens 1, 2, 3 are the prompt's; the answer is from token 4 on.
  expected = [1, 1, 1, 0, 0, 0, 0, 0] if memorise == "prompt" else [0] * 8
  assert seen["learn"].tolist() == [expected, [0] * 8]


def test_a_model_that_learns_from_its_prompt():
  """Only by the mode for it, and only where there is a prompt to learn."""
  base = dataclasses.replace(MODELS["hope_attention"](), layers=1)
  model = incontext.InContextModel(
    base, incontext.Options(chunks=(8,), fast_levels=("high",), rates=(0.5,))
  )
  params = model.init(jax.random.key(0))
  score = lambda mode: scoring.Scorer(model, VOCAB, mesh(), memorise=mode)(
    params, pairs(((30, 4), (1, 30)))
  )
  none, prompt = score("none"), score("prompt")
  assert abs(none.lls[0] - prompt.lls[0]) > 1e-3
  assert none.lls[1] == prompt.lls[1]


@pytest.mark.parametrize("options,sentence", [
  (dict(memorise="answer"), "memorise must be none or prompt"),
  (dict(batch_tokens=0), "batch_tokens must be >= 1"),
])  # fmt: skip
def test_mistakes(options, sentence):
  with pytest.raises(ValueError, match=sentence):
    scorer(**options)
  with pytest.raises(ValueError, match="has 321 ids and the model only"):
    scoring.Scorer(made("hope")[0], 321, mesh())


def test_two_hosts_score_as_one():
  """Two processes of two devices each: all rows and scores on both."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  started = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.eval.host", str(port), str(i)],
      cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    for i in range(2)
  ]  # fmt: skip
  outs = []
  for process in started:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    outs.append(np.array(out.split()[-5:], float))
  np.testing.assert_array_equal(*outs)
  _, params = made("transformer")
  alone = scorer("transformer")(params, pairs())
  np.testing.assert_allclose(outs[0], alone.lls, rtol=1e-5)
