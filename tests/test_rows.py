"""Many texts at once are each of them alone."""

import json

import jax
import numpy as np
import pytest

from experiments.cli import many
from nl_jax import rows, stream
from nl_jax.data import tokenizers
from tests.laws.models import MODELS

LENGTHS = (7, 40, 1, 23)


def texts(lengths=LENGTHS, seed=0):
  draw = np.random.default_rng(seed)
  return [draw.integers(3, 259, n).astype(np.int32) for n in lengths]


@pytest.mark.parametrize(
  "name", ["hope", "titans_mac", "rwkv7", "hope_attention_window"]
)
def test_rows_are_read_as_if_alone(name):
  net = MODELS[name]()
  params = net.init(jax.random.key(0))
  alone = [stream.start(net, params) for _ in LENGTHS]
  first, then = texts(), texts(LENGTHS[::-1], 1)
  expected = [
    [r.score(text[None])[0] for r, text in zip(alone, part)]
    for part in (first, then)
  ]
  together = rows.join([stream.start(net, params) for _ in LENGTHS])
  for part, wanted in zip((first, then), expected):
    for got, one in zip(rows.score(together, part), wanted):
      np.testing.assert_allclose(got, one, atol=3e-5)
  for row, one in enumerate(alone):
    own = rows.part(together, row)
    np.testing.assert_allclose(own.logits, one.logits, atol=3e-5)
    assert own.state.position_B == one.state.position_B
    np.testing.assert_allclose(
      own.score(first[1][None]), one.score(first[1][None]), atol=3e-5
    )


def test_a_row_without_a_text_stays_as_it_is():
  net = MODELS["hope_linear"]()
  params = net.init(jax.random.key(0))
  together = rows.join([stream.start(net, params) for _ in range(2)])
  rows.score(together, texts((9, 5)))
  before = stream.clone(rows.part(together, 1).state)
  logits = np.asarray(together.logits[1])
  empty, more = rows.score(together, [*texts((30,)), np.zeros(0, np.int32)])[
    ::-1
  ]
  assert empty.size == 0 and more.size == 30
  jax.tree.map(
    np.testing.assert_array_equal, before, rows.part(together, 1).state
  )
  np.testing.assert_array_equal(logits, together.logits[1])


def test_what_cannot_be_joined_is_refused():
  net = MODELS["transformer"]()
  params = net.init(jax.random.key(0))
  with pytest.raises(ValueError, match="keeps every token that it reads"):
    rows.join([stream.start(net, params)])
  with pytest.raises(ValueError, match="there are no streams"):
    rows.join([])
  net = MODELS["hope_linear"]()
  reader = rows.join([stream.start(net, net.init(jax.random.key(0)))])
  with pytest.raises(ValueError, match="1 rows need as many texts, got 2"):
    rows.score(reader, texts((1, 2)))


@pytest.fixture(scope="module")
def model():
  net = MODELS["hope_linear"]()
  return net, net.init(jax.random.key(0))


def written(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def test_64_texts_with_64_memories_are_64_runs(model, tmp_path):
  tokenizer, (net, params) = tokenizers.load("bytes"), model
  lines = [
    {"name": f"n{i}", "text": "abc " * (i % 7 + 1) + str(i)} for i in range(64)
  ]
  more = [line | {"text": line["text"][::-1]} for line in lines]
  for part in (lines, more):
    path = written(tmp_path / "texts.jsonl", part)
    prompts = many.load(path, str(tmp_path / "m"))
    many.check(prompts, net, params)
    done = {
      x.prompt.name: x for x in many.read(prompts, net, params, tokenizer)
    }
  assert len(done) == 64 == len(list((tmp_path / "m").iterdir()))
  for i in range(0, 64, 9):
    alone = stream.start(net, params)
    for line in (lines[i], more[i]):
      nats = alone.score(tokenizer.encode(line["text"])[None])
    own, _ = stream.go_on(net, params, tmp_path / "m" / f"n{i}.memory")
    np.testing.assert_allclose(done[f"n{i}"].nats, np.nansum(nats), rtol=1e-4)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5),
      own.state, alone.state,
    )  # fmt: skip
  drawn = dict(
    (p.name, text)
    for p, text in many.sample(
      prompts[:3], net, params, tokenizer, 5, temperature=0.0
    )
  )
  reader, _ = stream.go_on(net, params, prompts[0].memory)
  reader.read(tokenizer.encode(prompts[0].text)[None])
  ids = reader.sample(5, vocab_size=259, temperature=0.0, stop_id=1)
  ids = [int(x[0]) for x in ids]
  ids = ids[: ids.index(1)] if 1 in ids else ids
  assert drawn["n0"] == tokenizer.decode(ids)


@pytest.mark.parametrize("line,sentence", [
  ("{", "texts.jsonl:2 is not JSON"),
  ('{"name": "../a", "text": "b"}', '"name" must be letters, digits and'),
  ('{"name": "c", "text": ""}', """"text" must be a text, got ''"""),
  ('{"name": "a", "text": "b"}', "the name 'a' already exists"),
  ("[" * 200_000, "texts.jsonl:2 is not JSON"),
])  # fmt: skip
def test_a_line_that_is_no_text(tmp_path, line, sentence):
  path = tmp_path / "texts.jsonl"
  path.write_text('{"name": "a", "text": "b"}\n' + line + "\n")
  with pytest.raises(ValueError) as found:
    many.load(str(path), str(tmp_path))
  assert sentence in str(found.value)


def test_a_memory_of_another_model_is_found_first(model, tmp_path):
  other = MODELS["gated_deltanet"]()
  params = other.init(jax.random.key(0))
  reader = stream.start(other, params)
  stream.save_memory(tmp_path / "b.memory", other, params, reader.state)
  path = written(
    tmp_path / "t.jsonl",
    [{"name": "a", "text": "x"}, {"name": "b", "text": "y"}],
  )
  prompts = many.load(path, str(tmp_path))
  with pytest.raises(ValueError, match="the memory of another model"):
    many.check(prompts, *model)
  assert not (tmp_path / "a.memory").exists()
