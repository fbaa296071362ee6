"""The same numbers through seqio: wrapper, converter, tasks, mixture."""

import pytest

seqio = pytest.importorskip(
  "seqio", reason="seqio is not installed: pip install -e .[eval]"
)

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from nl_jax.data import tokenizers  # noqa: E402
from nl_jax.eval import (  # noqa: E402
  converter,
  encoding,
  evaluate,
  requests,
  scoring,
  tasks,
  vocabulary,
)
from tests.eval import documents, test_golden, toy  # noqa: E402

TEXTS = ("", "a plain text", " spaces  kept \n", "naïve 日本 \N{GRINNING FACE}")


@pytest.fixture(autouse=True)
def nothing_stays_registered():
  yield
  tasks.remove()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = documents.write(tmp_path_factory.mktemp("documents"))
  rows = encoding.Protocol(96, 96, prefix_id=1)
  tokenizer = tokenizers.Bytes()
  made = [
    evaluate.prepare(name, folder, tokenizer, rows) for name in requests.TASKS
  ]
  return [*made, evaluate.prepare("wikitext_40", folder, tokenizer, rows)]


def assert_same_vocabulary(ours, theirs):
  assert ours.vocab_size == theirs.vocab_size
  for field in ("pad_id", "eos_id", "bos_id", "unk_id"):
    assert getattr(ours, field) == getattr(theirs, field), field
  for text in TEXTS:
    ids = list(theirs.encode(text))
    assert list(ours.encode(text)) == ids
    assert ours.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert ours.decode(ids) == theirs.decode(ids)


def test_bytes_are_seqios():
  assert_same_vocabulary(
    vocabulary.Vocabulary(tokenizers.Bytes()), seqio.ByteVocabulary()
  )


def test_sentencepiece_is_seqios(data_dir):
  path = data_dir / "tokenizers" / "mistral_v1_32000.model"
  if not path.is_file():
    pytest.skip(f"no {path}")
  theirs = seqio.SentencePieceVocabulary(str(path), extra_ids=0)
  assert_same_vocabulary(
    vocabulary.Vocabulary(tokenizers.load(str(path))), theirs
  )


def test_converter_inserts_nothing_and_caps_the_length():
  rows = {
    "inputs": [[5, 6, 7], [8]],
    "targets": [[9], [0, 3]],  # 0 is a token like any other.
  }
  ds = tf.data.Dataset.from_generator(
    lambda: ({k: np.int32(v[i]) for k, v in rows.items()} for i in range(2)),
    output_signature={k: tf.TensorSpec([None], tf.int32) for k in rows},
  )
  convert = converter.ScoringFeatureConverter(3)
  lengths = {"inputs": 3, "targets": 2}
  assert set(convert.get_model_feature_lengths(lengths).values()) == {3}
  found = list(convert(ds, lengths).as_numpy_iterator())
  expected = [([5, 6, 7], [6, 7, 9], [0, 0, 1]),
              ([8, 0, 0], [0, 3, 0], [1, 1, 0])]  # fmt: skip
  for row, (inputs, labels, weights) in zip(found, expected):
    assert row["decoder_input_tokens"].tolist() == inputs
    assert row["decoder_target_tokens"].tolist() == labels
    assert row["decoder_loss_weights"].tolist() == weights


def test_tasks_and_mixture_are_the_direct_way(prepared):
  through = evaluate.through_seqio(prepared, tokenizers.Bytes())
  score = test_golden.toy_scores
  for one in prepared:
    assert through(one, score) == evaluate.direct(one, score), one.name
  whole = tasks.evaluate(tasks.MIXTURE, 96, score)
  assert {*whole} == {tasks.name(name) for name in requests.TASKS}
  for one in prepared[:-1]:
    assert whole[tasks.name(one.name)] == evaluate.direct(one, score)


def test_scores_may_come_in_any_order_and_never_see_the_gold(prepared):
  """Reversed rows; and golds turned around, which no score may notice."""
  (one,) = [x for x in prepared if x.name == "arc_easy"]
  seen = []

  def score(pairs):
    seen.append([(a.tolist(), b.tolist()) for a, b in pairs])
    return test_golden.toy_scores(pairs)

  turned = one._replace(rows=one.rows._replace(rows=[
    row._replace(about=row.about | {"gold": 2 - row.about["gold"]})
    for row in one.rows.rows
  ]))  # fmt: skip
  reverse = one._replace(rows=one.rows._replace(rows=one.rows.rows[::-1]))
  out = []
  for made in (one, turned, reverse):
    through = evaluate.through_seqio([made], tokenizers.Bytes())
    out.append(through(made, score))
  assert seen[0] == seen[1] == seen[2][::-1]
  assert out[0][1] == out[1][1]
  assert out[0][0] == out[2][0] != out[1][0]


def test_what_fails_is_a_result(prepared):
  def score(pairs):
    raise RuntimeError("RESOURCE_EXHAUSTED: too little\nmore")

  one = prepared[2]
  through = evaluate.through_seqio([one], tokenizers.Bytes())
  record = evaluate.run(one, score, through).record
  assert record["error"] == "RESOURCE_EXHAUSTED: too little"
  assert record["metrics"] == {} and record["n_requests"] == 6


def test_a_full_run_through_seqio(data_dir):
  """All real files with the toy model: the frozen metrics, as one mixture."""
  rows = encoding.Protocol(2048, 2048, prefix_id=1)
  tokenizer = tokenizers.Bytes()
  try:
    made = [evaluate.prepare(name, data_dir, tokenizer, rows)
            for name in ("wikitext", "piqa", "boolq")]  # fmt: skip
  except FileNotFoundError as error:
    pytest.skip(str(error))
  evaluate.through_seqio(made, tokenizer)
  found = tasks.evaluate(tasks.MIXTURE, 2048, test_golden.toy_scores)
  for one in made:
    frozen = test_golden.FROZEN["real"][one.name]
    if one.loaded.sha256 != frozen["file"]:
      pytest.skip(f"{one.loaded.path} is another file than the frozen one")
    values, scores = found[tasks.name(one.name)]
    test_golden.assert_as_frozen(values, frozen["metrics"])
    assert isinstance(scores, scoring.Scores)
    assert toy.VOCAB == 259
