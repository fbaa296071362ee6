"""Files of every kind, damaged in every way: read as they are, or a sentence.

Whole files are made once. A case copies what it needs, damages one file of it
and reads it as a command would. What is read in spite of the damage must be
good: batches of the shape and ids that they promise, or, of sealed files, bit
for bit what was written.
"""

import functools
import gzip
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.fuzz import run as run_lib

Case = run_lib.Case
Wrong = run_lib.Wrong

_CONFIG = "hope_linear_tiny:smoke"
_PARAMS = "params.npz"
_SPANS = {
  "zeros": b"\0", "ones": b"\xff", "newlines": b"\n", "returns": b"\r",
  "spaces": b" ", "quotes": b'"', "backslashes": b"\\", "open braces": b"{",
  "open brackets": b"[", "commas": b",", "digits": b"9", "minus signs": b"-",
  "continuation bytes": b"\x80", "lead bytes": b"\xf0", "escapes": b"\x1b",
}  # fmt: skip
_INSERTED = {
  "a byte order mark": b"\xef\xbb\xbf", "a surrogate": b"\xed\xa0\x80",
  "a line separator": "\u2028".encode(), "an overlong": b"\xc0\xaf",
  "a right-to-left mark": "\u202e".encode(), "NaN": b"NaN", "null": b"null",
  "deep brackets": b"[" * 100_000, "a long number": b"9" * 5_000,
  "UTF-16": "text".encode("utf-16"), "a shell": b"#!/bin/sh\n",
  "a zip's head": b"PK\3\4", "gzip's head": b"\x1f\x8b\x08",
}  # fmt: skip
DAMAGES = (
  "flip", "span", "insert", "cut", "empty", "head", "grow", "random", "swap",
  "double", "remove", "folder", "loop", "pipe",
)  # fmt: skip


class Kind(NamedTuple):
  """A kind of file.

  Attributes:
    pattern: of the files that are damaged, below the folder of all.
    read: what reads it, given the folder; returns in words what was read.
    weight: how often it is taken.
  """

  pattern: str
  read: Callable[[pathlib.Path], str]
  weight: int = 2


def make(folder: pathlib.Path) -> None:
  """Makes whole files of all kinds; in a process of its own, for it computes.

  Args:
    folder: to make them in.
  """
  import jax
  import numpy as np
  import pyarrow
  from array_record.python import array_record_module
  from pyarrow import parquet

  from experiments.cli import named
  from experiments.faults import data as data_lib
  from experiments.stack import stacked
  from nl_jax import build, stream
  from nl_jax.data import tokenizer_training

  data_lib.prepare(folder)
  lines = (folder / data_lib.TEXT).read_text().splitlines()
  texts = [json.loads(line)["text"] for line in lines]
  (folder / "text.txt").write_text("\n".join(texts))
  with gzip.open(folder / "corpus.jsonl.gz", "wb") as file:
    file.write("\n".join(lines).encode())
  parquet.write_table(pyarrow.table({"text": texts}), folder / "text.parquet")
  writer = array_record_module.ArrayRecordWriter(
    str(folder / "text.array_record"), "group_size:1"
  )
  for text in texts:
    writer.write(text.encode())
  writer.close()
  _make_tokenizers(folder, texts, tokenizer_training)
  config = build.resolve(named.load_config(_CONFIG))
  net = build.model(config)
  # As good as an init, without its compile.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(x.dtype),
    jax.eval_shape(net.init, jax.random.key(0)),
  )
  np.savez(folder / _PARAMS, *jax.tree.leaves(params))
  stacked.save(folder / "run", config, params)
  rows = [
    {"step": i, "tokens": 512 * i, "wall_time": 1.0 * i, "train/loss": 5.0 / i,
     "eval/validation/nat_per_byte": 3.0 / i}
    for i in range(1, 9)
  ]  # fmt: skip
  logged = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "run" / "metrics.jsonl").write_text(logged)
  results = {"step": 8, "train_seconds": 8.0, "metrics": rows[-1]}
  (folder / "run" / "results.json").write_text(json.dumps(results))
  state = net.init_state(params, 1)
  stream.save_memory(folder / "book.memory", net, params, state)


def _make_tokenizers(
  folder: pathlib.Path, texts: list[str], training: Any
) -> None:
  import tokenizers

  made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=310, special_tokens=["<unk>", "</s>"], show_progress=False
  )
  made.train_from_iterator(texts, trainer)
  made.save(str(folder / "tokenizer.json"))
  size = sum(map(len, texts))
  training.train(texts, size, folder / "words.model", 310)


def _data(source: str, path: str) -> Callable[[pathlib.Path], str]:
  return lambda folder: _batch(
    source=source, path=str(folder / path), tokenizer="bytes"
  )


def _batch(**how: str) -> str:
  import numpy as np

  from nl_jax import data

  made = data.load(
    **how, sequence_length=64, batch_size=2, alignment=16, vocab_size=320
  )
  for batch in (next(made.train), made.validation(1)[0]):
    for key in ("inputs", "targets", "weights", "segment_ids"):
      if batch[key].shape != (2, 64):
        raise Wrong(f"{key} of shape {batch[key].shape}")
    ids = np.concatenate([batch["inputs"], batch["targets"]])
    if ids.min() < 0 or ids.max() >= 320:
      raise Wrong(f"ids from {ids.min()} to {ids.max()}")
    if not np.isin(batch["weights"], (0, 1)).all():
      raise Wrong("weights that are neither 0 nor 1")
  return made.describe()


def _tokenizer(name: str) -> Callable[[pathlib.Path], str]:
  def read(folder: pathlib.Path) -> str:
    from nl_jax.data import tokenizers

    made = tokenizers.load(str(folder / name))
    tokenizers.check_vocabulary(made, 320)
    ids = made.encode("Some text, 1 + 1 = 2.\n")
    if not all(0 <= x < made.vocab_size for x in ids):
      raise Wrong(f"ids beyond {made.vocab_size}: {ids}")
    return f"{made.name}: {made.decode(ids)!r}"

  return read


def _run_config(folder: pathlib.Path) -> str:
  from nl_jax import build

  config, net = build.of_run(str(folder / "run"))
  return f"{config.model.arch} of {net.parameter_count()} parameters"


def _report(folder: pathlib.Path) -> str:
  from nl_jax.report import folder

  made = folder.write([str(folder / "run")], folder / "page")
  return ", ".join(path.name for path in made)


def _whole(folder: pathlib.Path) -> tuple[Any, Any]:
  """The model of the files, and its parameters as they were written."""
  import jax
  import numpy as np

  from experiments.cli import named
  from nl_jax import build

  net = build.model(build.resolve(named.load_config(_CONFIG)))
  like = jax.tree.structure(jax.eval_shape(net.init, jax.random.key(0)))
  with np.load(folder / _PARAMS) as leaves:
    return net, jax.tree.unflatten(like, list(leaves.values()))


def _same(got: Any, wanted: Any) -> None:
  import jax
  import numpy as np

  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    if not np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True):
      raise Wrong("arrays other than those that were written")


def _checkpoint(folder: pathlib.Path) -> str:
  from nl_jax.train import checkpoint

  net, params = _whole(folder)
  got, step = checkpoint.load_params(str(folder / "run"), net)
  _same(got, params)
  return f"the parameters of step {step}"


def _memory(folder: pathlib.Path) -> str:
  from nl_jax import stream

  net, params = _whole(folder)
  state, _, manifest = stream.load_memory(folder / "book.memory", net, params)
  _same(state, net.init_state(params, 1))
  return f"a memory after {manifest['tokens_seen']} tokens"


KINDS = {
  "text": Kind("text.txt", _data("text", "text.txt"), 4),
  "jsonl": Kind("corpus.jsonl", _data("jsonl", "corpus.jsonl"), 4),
  "jsonl.gz": Kind("corpus.jsonl.gz", _data("jsonl", "corpus.jsonl.gz"), 3),
  "parquet": Kind("text.parquet", _data("parquet", "text.parquet"), 4),
  "array_record": Kind(
    "text.array_record", _data("array_record", "text.array_record"), 3
  ),
  "prepared": Kind("prepared/**/*", _data("prepared", "prepared"), 4),
  "tokenizer.json": Kind("tokenizer.json", _tokenizer("tokenizer.json"), 4),
  "words.model": Kind("words.model", _tokenizer("words.model"), 4),
  "config.json": Kind("run/config.json", _run_config, 4),
  "metrics.jsonl": Kind("run/metrics.jsonl", _report, 2),
  "results.json": Kind("run/results.json", _report, 1),
  "checkpoint": Kind("run/checkpoints/**/*", _checkpoint, 4),
  "memory": Kind("book.memory", _memory, 3),
}


def cases(
  count: int, whole: pathlib.Path, draw: random.Random, kinds: list[str]
) -> list[Case]:
  """Damaged files to read.

  Args:
    count: how many.
    whole: the folder of `make`.
    draw: what decides the damage.
    kinds: which, of `KINDS`.
  """
  weights = [KINDS[name].weight for name in kinds]
  made = []
  for _ in range(count):
    name = draw.choices(kinds, weights)[0]
    kind = KINDS[name]
    found = sorted(x for x in whole.glob(kind.pattern) if x.is_file())
    path = draw.choice(found).relative_to(whole)
    how, seed = draw.choice(DAMAGES), draw.randrange(2**32)
    what = f"{path}: {how} (seed {seed})"
    run = functools.partial(_damaged, whole, kind, path, how, seed)
    made.append(Case(name, what, run))
  return made


def _damaged(
  whole: pathlib.Path, kind: Kind, path: pathlib.Path, how: str, seed: int
) -> str:
  folder = pathlib.Path.cwd() / "all"
  shutil.copytree(whole, folder)
  damage(folder / path, how, random.Random(seed))
  return kind.read(folder)


def damage(path: pathlib.Path, how: str, draw: random.Random) -> None:
  """Damages a file.

  Args:
    path: of the file.
    how: one of `DAMAGES`.
    draw: where, and with what.
  """
  content = path.read_bytes()
  path.unlink()
  if how == "remove":
    return
  if how == "folder":
    path.mkdir()
  elif how == "loop":
    path.symlink_to(path.name)
  elif how == "pipe":
    os.mkfifo(path)
  else:
    path.write_bytes(_changed(content, how, draw))


def _changed(content: bytes, how: str, draw: random.Random) -> bytes:
  size = max(len(content), 1)
  a = draw.randrange(size)
  b = min(a + draw.choice((1, 2, 8, 64, 512)), size)
  if how == "flip":
    bit = 1 << draw.randrange(8)
    return (
      content[:a]
      + bytes(x ^ bit for x in content[a : a + 1])
      + (content[a + 1 :])
    )
  if how == "span":
    fill = _SPANS[draw.choice(sorted(_SPANS))]
    return content[:a] + fill * (b - a) + content[b:]
  if how == "insert":
    return content[:a] + _INSERTED[draw.choice(sorted(_INSERTED))] + content[a:]
  if how == "head":
    return _INSERTED[draw.choice(sorted(_INSERTED))] + content
  if how == "random":
    return content[:a] + draw.randbytes(b - a) + content[b:]
  if how == "swap":
    middle = (a + b) // 2
    return content[:a] + content[middle:b] + content[a:middle] + content[b:]
  return {
    "cut": content[:a],
    "empty": b"",
    "grow": content + draw.randbytes(b - a),
    "double": content[:b] + content[a:],
  }[how]
