"""The corpus of the runs that faults are done to, and what damages files."""

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from nl_jax.data import partition, preparation, sources

TEXT = "corpus.jsonl"
SHARDS = "prepared"
LENGTH = 64  # Tokens of a row, as in configs of the smoke size.
_DOCUMENTS = 60
_SHARD_BYTES = 4096
_ALIGNMENT = 16  # Of the matrix memories, and good for attention.


def prepare(folder: pathlib.Path) -> pathlib.Path:
  """Prepares a small corpus of many shards; repairs what is damaged of it.

  Args:
    folder: of the text and of the folder of the shards.

  Returns:
    The folder of the shards.
  """
  text, out = folder / TEXT, folder / SHARDS
  if not text.exists():
    documents = sources.synthetic(0, _DOCUMENTS).documents("train")
    lines = [json.dumps({"text": document}) for document in documents]
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
  settings = partition.Settings(
    kind="jsonl",
    path=str(text),
    tokenizer="bytes",
    sequence_length=LENGTH,
    alignment=_ALIGNMENT,
    shard_bytes=_SHARD_BYTES,
  )
  tokenizer = preparation.check(settings)
  about = preparation.claim(settings, tokenizer)
  jobs = [
    preparation.Job(i, pieces, settings, str(out))
    for i, pieces in enumerate(partition.plan(settings))
  ]
  preparation.open_folder(out, about)
  with preparation.lock(out):
    for job in jobs:
      preparation.run_job(job, lambda size: None)
    preparation.finish(out, settings, about, tokenizer, len(jobs))
  return out


def lose_shard(shards: pathlib.Path, rng: np.random.Generator) -> str:
  """Removes a shard of the training split; returns what was done."""
  path = _any(sorted(shards.glob("train-*")), rng)
  path.unlink()
  return f"{path.name} removed"


def garble_shard(shards: pathlib.Path, rng: np.random.Generator) -> str:
  """Cuts a shard, or writes random bytes over it; returns what was done."""
  path = _any(sorted(shards.glob("train-*")), rng)
  if rng.random() < 0.3:
    return f"{path.name} {_cut(path, rng)}"
  content = bytearray(path.read_bytes())
  # The format pads its blocks with zeros, which nobody reads.
  used = np.flatnonzero(np.frombuffer(bytes(content), np.uint8))
  start = int(used[rng.integers(len(used))])
  size = min(int(rng.integers(1, 257)), len(content) - start)
  content[start : start + size] = rng.bytes(size)
  with path.open("rb+") as file:  # In place, under a reader's hands.
    file.write(content)
  return f"{path.name}: {size} random bytes at {start}"


def tear(step: pathlib.Path, rng: np.random.Generator) -> str:
  """Damages the folder of a checkpoint; returns what was done."""
  ways: list[Callable[[pathlib.Path, np.random.Generator], str]] = [
    _cut_one, _cut_one, _remove_one, _remove_one, _turn_one, _turn_one,
    _cut_all, _remove_item, _remove_all,
  ]  # fmt: skip
  return ways[int(rng.integers(len(ways)))](step, rng)


def _any(paths: list[pathlib.Path], rng: np.random.Generator) -> pathlib.Path:
  return paths[int(rng.integers(len(paths)))]


def _files(step: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in step.rglob("*") if path.is_file())


def _cut(path: pathlib.Path, rng: np.random.Generator) -> str:
  """Leaves the first bytes of a file, none perhaps."""
  content = path.read_bytes()
  size = int(rng.integers(0, max(1, len(content))))
  with path.open("rb+") as file:
    file.truncate(size)
  return f"cut from {len(content)} to {size} bytes"


def _cut_one(step: pathlib.Path, rng: np.random.Generator) -> str:
  path = _any(_files(step), rng)
  return f"{path.relative_to(step)} {_cut(path, rng)}"


def _cut_all(step: pathlib.Path, rng: np.random.Generator) -> str:
  for path in _files(step):
    _cut(path, rng)
  return "all files cut"


def _remove_one(step: pathlib.Path, rng: np.random.Generator) -> str:
  path = _any(_files(step), rng)
  path.unlink()
  return f"{path.relative_to(step)} removed"


def _turn_one(step: pathlib.Path, rng: np.random.Generator) -> str:
  paths = [path for path in _files(step) if path.stat().st_size]
  # The larger a file, the likelier.
  sizes = np.array([path.stat().st_size for path in paths], np.float64)
  path = paths[int(rng.choice(len(paths), p=sizes / sizes.sum()))]
  content = bytearray(path.read_bytes())
  byte, bit = int(rng.integers(len(content))), int(rng.integers(8))
  content[byte] ^= 1 << bit
  path.write_bytes(content)
  return f"bit {bit} of byte {byte} of {path.relative_to(step)} turned"


def _remove_item(step: pathlib.Path, rng: np.random.Generator) -> str:
  path = _any(sorted(p for p in step.iterdir() if p.is_dir()), rng)
  shutil.rmtree(path)
  return f"folder {path.name} removed"


def _remove_all(step: pathlib.Path, rng: np.random.Generator) -> str:
  del rng
  shutil.rmtree(step)
  step.mkdir()
  return "the folder emptied"
