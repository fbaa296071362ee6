"""Reading a long text, stopped anywhere, and sampling from a memory."""

import hashlib
import os
import re
import types

import jax
import numpy as np
import pytest

from experiments.cli import generation
from experiments.raster import recording
from experiments.read import reading
from nl_jax import stream
from nl_jax.data import tokenizers
from tests.experiments import forked
from tests.laws.models import MODELS

TEXT = "".join(
  f"line {i} of a long text, ünïcode {i * i}\n" for i in range(300)
)
SMOKE = ["--config.train.steps=2", "--config.eval.batches=1"]
SMOKE.append(f"--compilation_cache={os.environ['NL_TEST_CACHE']}")


@pytest.fixture
def model():
  net = MODELS["hope_linear"]()
  return net, net.init(jax.random.key(0))


def read(model, path, start=0, stop_after=None, reader=None):
  net, params = model
  reader = reader or stream.start(net, params)
  asked = types.SimpleNamespace(reason="")
  if stop_after is not None:
    inner = reader.score

    def score(tokens):
      asked.reason = "interrupted"
      return inner(tokens)

    reader.score = score
  done = reading.read(reader, tokenizers.Bytes(), path, start, net, asked)
  return done, reader


def test_the_sum_is_the_loss_of_the_text(model, tmp_path, monkeypatch):
  monkeypatch.setattr(reading, "_BLOCK", 1000)
  path = tmp_path / "a.txt"
  path.write_text(TEXT)
  done, reader = read(model, path)
  ids = tokenizers.Bytes().encode(TEXT)
  again = stream.start(*model)
  np.testing.assert_allclose(
    done.nats, np.nansum(again.score(ids[None])), rtol=1e-5
  )
  assert done.tokens == done.bytes == len(ids)
  assert int(reader.state.position_B[0]) == len(ids)
  _, means = done.curve.points()
  np.testing.assert_allclose(np.mean(means), done.nats / len(ids), rtol=0.02)
  for period, parts in done.chunks.values():
    assert period == 8 and parts[:, 1].sum() == len(ids) - 1


@pytest.mark.parametrize("prompt,first,begin,read", [
  ("ab", True, 8, [8, 100, 101]), ("", True, 8, [8]), ("", True, None, [13]),
  ("ab", False, 8, [100, 101]), ("", False, 8, None),
])  # fmt: skip
def test_what_is_written_begins_as_documents_do(prompt, first, begin, read):
  seen = []
  reader = types.SimpleNamespace(
    logits=None if first else 1, read=lambda ids: seen.append(ids[0].tolist()),
    sample=lambda *args, **kinds: iter(()),
  )  # fmt: skip
  tokenizer = tokenizers.Bytes()
  tokenizer.begin_id = begin
  assert list(generation.generate(reader, tokenizer, prompt, 5)) == [""]
  assert seen == ([] if read is None else [read])


@pytest.mark.parametrize("start,place", [(0, 101), (0, 1101), (300, 2999)])
def test_a_bad_byte_is_told_by_its_place(tmp_path, monkeypatch, start, place):
  monkeypatch.setattr(reading, "_BLOCK", 1000)
  content = bytearray((b"x" * 99 + b"\n") * 30)
  content[place] = 0xFF
  (tmp_path / "a.txt").write_bytes(content)
  reader = types.SimpleNamespace(
    state=types.SimpleNamespace(position_B=[0]),
    score=lambda ids: np.zeros(ids.shape, np.float32),
  )
  net = types.SimpleNamespace(levels=lambda: ([], None))
  with pytest.raises(ValueError, match=f"a.txt .* 0xff at offset {place};"):
    read((net, None), tmp_path / "a.txt", start, reader=reader)


def test_stopped_and_gone_on_is_one_reading(model, tmp_path, monkeypatch):
  monkeypatch.setattr(reading, "_BLOCK", 1000)
  path = tmp_path / "a.txt"
  path.write_text(TEXT)
  whole, reader = read(model, path)
  first, half = read(model, path, stop_after=1)
  assert 0 < first.bytes < 1000
  start = reading.place(path, first.place)
  assert start == first.bytes
  del half.score
  rest, half = read(model, path, start, reader=half)
  assert rest.place == whole.place
  assert whole.place["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
  np.testing.assert_allclose(first.nats + rest.nats, whole.nats, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    half.state, reader.state,
  )  # fmt: skip
  path.write_text("x" + TEXT)
  assert reading.place(path, first.place) == 0


def test_memory_does_not_grow_with_the_text():
  curve = reading.Curve()
  for i in range(0, 10**6, 5000):
    curve.add(i, np.full(5000, 2.0))
  assert len(curve.sums) <= 2 * reading._BINS
  xs, means = curve.points()
  assert means == [2.0] * len(xs) and sum(curve.counts) == 10**6


@pytest.mark.parametrize("text", ["é" * 5000, "a" * 5001 + "日本" * 900])
def test_long_lines_are_cut_between_characters(tmp_path, monkeypatch, text):
  monkeypatch.setattr(reading, "_BLOCK", 100)
  path = tmp_path / "a.txt"
  path.write_text(text)
  with path.open("rb") as file:
    pieces = []
    while block := reading._piece(file):
      pieces.append(block.decode("utf-8"))
  assert "".join(pieces) == text and max(map(len, pieces)) <= 100


@pytest.mark.parametrize("place", [0, 99, 100, 101, 250])
def test_a_bad_byte_is_named_before_the_work(tmp_path, monkeypatch, place):
  monkeypatch.setattr(reading, "_BLOCK", 100)
  path = tmp_path / "a.txt"
  path.write_bytes(b"a" * place + "é".encode()[:1] + b"b" * 40)
  with pytest.raises(ValueError, match=f"0xc3 at offset {place};"):
    reading.check_text(path)
  path.write_bytes(("é" * 300).encode())
  reading.check_text(path)


def test_what_begins_again_is_the_model_without_its_memory(model):
  ids = np.random.default_rng(0).integers(3, 259, (1, 50))
  blind = reading.Forgetful(*model, 20)
  nats = np.concatenate([blind.score(ids[:, :33]), blind.score(ids[:, 33:])], 1)
  parts = []
  for start in (0, 20, 40):
    reader = stream.start(*model)
    if start:
      reader.read(ids[:, start - 1 : start])
    parts.append(reader.score(ids[:, start : start + 20]))
  np.testing.assert_allclose(nats, np.concatenate(parts, 1), atol=3e-5)
  assert np.isnan(nats[0, 0]) and np.isfinite(nats[0, 1:]).all()


def test_the_commands(tmp_path):
  (tmp_path / "book.txt").write_text(TEXT)
  (tmp_path / "other.txt").write_text(TEXT[50:])
  (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
  (tmp_path / "poem").write_text("not a memory")
  (tmp_path / "mine.png").write_text("a picture of mine")
  run, read_ = "--workdir=h", ["read", "--workdir=h", "--memory_out=a.memory"]
  point = ["read", run, "--text=book.txt", "--forget_every=0"]
  new = ["read", "--workdir=h", "--memory_out=c"]
  results = forked.run([
    ["lm", "--config=hope_linear_tiny:smoke", run, *SMOKE],
    ["lm", "--config=transformer_tiny:smoke", "--workdir=t", *SMOKE],
    [*read_, "--text=book.txt", "--forget_every=512"],
    [*read_, "--text=book.txt", "--memory_in=a.memory"],
    [*read_, "--text=other.txt", "--memory_in=a.memory"],
    ["sample", run, "--tokens=5", "--memory_in=a.memory",
     "--memory_out=b.memory"],
    ["sample", run, "--tokens=5", "--prompt_file=book.txt"],
    ["sample", run, "--tokens=5"],
    ["raster", run, "--text=book.txt", "--tokens=40"],
    # Mistakes.
    ["raster", "--workdir=t", "--text=book.txt"],
    ["read"],
    ["read", "--workdir=t", "--text=book.txt", "--memory_out=c"],
    [*new, "--text=no.txt"],
    [*new, "--text=latin.txt"],
    [*new, "--text=book.txt", "--memory_in=poem"],
    ["sample", "--workdir=t", "--memory_in=a.memory"],
    ["sample", run, "--memory_out=poem", "--tokens=1", "--overwrite"],
    ["sample", run, "--memory_out=a.memory", "--tokens=1"],
    [*read_, "--text=book.txt"],
    ["read", run, "--text=book.txt", "--memory_out=t"],
    ["read", run, "--text=book.txt", "--memory_out=no/c"],
    ["read", run, "--text=book.txt", "--memory_out=poem", "--overwrite"],
    ["read", run, "--text=book.txt", "--memory_out=mine"],
    # Points and drift.
    [*point, "--point=before", "--drift_bound=0.001", "--memory_out=d"],
    [*point, "--memory_in=d", "--roll_back=before", "--memory_out=e"],
    [*point, "--memory_in=d", "--roll_back=after", "--memory_out=f"],
    [*point, "--since=before", "--memory_out=f"],
    [*point, "--drift_bound=-1", "--memory_out=f"],
  ], tmp_path)  # fmt: skip
  for done in results[:9]:
    assert done.returncode == 0, done.stderr
  size = f"{len(TEXT.encode()):,}"
  assert f"{size} bytes" in results[2].stdout
  told = f"loading the model of h ...\n.*reading from byte 0 of {size}\n"
  assert re.match(told, results[2].stderr, re.DOTALL)
  assert (tmp_path / "a.memory.png").read_bytes().startswith(b"\x89PNG")
  assert "begins again every 512 tokens: " in results[2].stdout
  assert "nothing left to read" in results[3].stdout
  assert "another text: reading this one from its beginning" in (
    results[4].stderr
  )
  assert "a memory of" in results[5].stderr
  stopped, back = results[-5:-3]
  assert "it writes no more" in stopped.stderr
  # A memory that kept nothing of the text is where it began.
  assert "drift:   0 " in stopped.stdout and "drift:   0 " not in back.stdout
  assert f"{size} bytes" in back.stdout  # From the first byte again.
  assert back.returncode == stopped.returncode == 0
  del results[-5:-3]
  said = [done.stderr.strip().splitlines()[-1] for done in results[9:]]
  assert "memory: changed in 5 of 5 chunks" in results[8].stdout
  assert (tmp_path / "h" / "raster.png").read_bytes().startswith(b"\x89PNG")
  for line, words in zip(said, (
    "has no memory that changes", "--workdir is required",
    "keeps every token that it reads",
    "no file --text=no.txt", "latin.txt is not UTF-8: byte 0xe9 at offset 3;",
    "not a memory file, or a torn one", "the memory of another model",
    "not a memory file, or a torn one", "a.memory already exists",
    "a.memory already exists", "--memory_out=t is a folder",
    "there is no folder no", "not a memory file, or a torn one",
    "mine.png already exists",
    "has no point 'after'; it has: before", "--since needs --drift_bound",
    "must be above 0, got -1",
  )):  # fmt: skip
    assert words in line, line
  assert all(done.returncode == 1 for done in results[9:])
  assert all("Traceback" not in done.stderr for done in results)
  assert (tmp_path / "poem").read_text() == "not a memory"
  assert (tmp_path / "mine.png").read_text() == "a picture of mine"
  assert not (tmp_path / "mine").exists() and not (tmp_path / "c").exists()


def test_a_trace_is_what_one_pass_measures(model):
  net, params = model
  ids = np.random.default_rng(0).integers(3, 259, 45)
  shown = recording.trace(net, params, ids)
  assert shown.ends == [8, 16, 24, 32, 40]
  whole = stream.start(net, params)
  np.testing.assert_allclose(
    shown.nats[1:], whole.score(ids[None, :40])[0, 1:], atol=3e-5
  )
  _, _, metrics = jax.jit(net.apply)(params, ids[None, :40])
  for name, level in shown.levels.items():
    total = metrics[name].update_norm.sum() / metrics[name].count.sum()
    np.testing.assert_allclose(np.mean(level["update_norm"]), total, rtol=1e-4)
  with pytest.raises(ValueError, match="a chunk takes 8"):
    recording.trace(net, params, ids[:5])
