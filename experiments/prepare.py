"""Prepares a corpus for training: tokenised, packed rows in shards, once.

    python -m experiments.prepare --source=jsonl --path=corpus --out=prepared \\
        --tokenizer=words.model --for_config=hope_1b3
    python -m experiments.lm --config=hope_1b3 --config.data.source=prepared \\
        --config.data.path=prepared --config.data.tokenizer=words.model

The same command goes on where it was stopped, and mends damaged shards. The
shards do not depend on the number of workers. Without a tokenizer of one's own:

    python -m experiments.prepare --train_tokenizer=words.model \\
        --vocab_size=32000 --source=jsonl --path=corpus
"""

import pathlib
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from experiments import _flags, _main, _prepare_pool

_SOURCE = flags.DEFINE_string("source", "text", "text, jsonl or parquet.")
_PATH = flags.DEFINE_string("path", "", "A file, or a folder with such files.")
_OUT = flags.DEFINE_string("out", "", "Folder of the prepared corpus.")
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "bytes", "bytes, a SentencePiece .model or a tokenizer.json."
)
_TEXT_KEY = flags.DEFINE_string(
  "text_key", "text", "Field of jsonl, or column of parquet, with the text."
)
_CONFIG = flags.DEFINE_string(
  "for_config", "", "A config's name: its sequence length and alignment."
)
_LENGTH = flags.DEFINE_integer(
  "sequence_length", 0, "Tokens of a row; 0: of --for_config."
)
_ALIGNMENT = flags.DEFINE_integer(
  "alignment", 0, "Documents start at multiples; 0: of --for_config."
)
_PERCENT = flags.DEFINE_float(
  "validation_percent", 10.0, "Of the documents of jsonl and parquet, held out."
)
_SHARD = flags.DEFINE_integer(
  "shard_megabytes", 64, "Of input in a shard, about.", lower_bound=1
)
_WORKERS = flags.DEFINE_integer(
  "workers", 0, "Processes; 0: as many as cores.", lower_bound=0
)
_TRAIN = flags.DEFINE_string(
  "train_tokenizer", "", "Train a SentencePiece model into this new file."
)
_VOCAB = flags.DEFINE_integer(
  "vocab_size", 32_000, "Pieces of the model that is trained."
)


def main() -> int:
  """Runs the command; returns its exit status."""
  if not _PATH.value:
    raise ValueError("--path is required: a file, or a folder with files")
  if _TRAIN.value:
    return _train_tokenizer()
  from nl_jax.data import preparation, prepared

  if not _OUT.value:
    raise ValueError("--out is required: the folder of the prepared corpus")
  begin, out = time.monotonic(), pathlib.Path(_OUT.value)
  settings = _settings()
  tokenizer = preparation.check(settings)
  about = preparation.claim(settings, tokenizer)
  shards = preparation.plan(settings)
  preparation.open_folder(out, about)
  jobs = [
    preparation.Job(i, pieces, settings, str(out))
    for i, pieces in enumerate(shards)
  ]
  size = sum(piece.size for job in jobs for piece in job.pieces)
  workers = _prepare_pool.size(_WORKERS.value, jobs)
  made = _prepare_pool.run(jobs, size, workers)
  manifest = preparation.finish(out, settings, about, tokenizer, len(jobs))
  seconds = time.monotonic() - begin
  for split, counts in manifest["counts"].items():
    print(
      f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, "
      f"{counts['tokens']:,} tokens in {counts['rows']:,} rows"
    )
  if len(made) < len(jobs):
    print(f"{len(jobs) - len(made)} of {len(jobs)} shards were there")
  size = sum(piece.size for i in made for piece in jobs[i].pieces)
  print(f"{size / 2**20 / seconds:.1f} MiB/s with {workers} workers")
  print(f"manifest: {prepared.manifest_hash(manifest)}")
  print(_next_command(settings, tokenizer.vocab_size))
  return _main.DONE


def _settings() -> Any:
  """The settings of the flags and of --for_config."""
  from nl_jax.data import preparation

  length, alignment = _LENGTH.value, _ALIGNMENT.value
  if _CONFIG.value:
    from experiments import _setup

    config = _flags.load_config(_CONFIG.value)
    net = _setup.model(_setup.resolve(config))
    length = length or config.data.sequence_length
    alignment = alignment or net.alignment
  if not length:
    raise ValueError(
      "--sequence_length is required, or --for_config=<name> to take it from a "
      f"config: {', '.join(_flags.config_names())}"
    )
  return preparation.Settings(
    kind=_SOURCE.value,
    path=_PATH.value,
    tokenizer=_TOKENIZER.value,
    sequence_length=length,
    alignment=alignment or 1,
    text_key=_TEXT_KEY.value,
    validation_percent=_PERCENT.value,
    shard_bytes=_SHARD.value * 2**20,
  )


def _next_command(settings: Any, vocab_size: int) -> str:
  """The command that trains on what was prepared."""
  parts = [
    f"next: python -m experiments.lm --config={_CONFIG.value or '<name>'}",
    f"--config.data.source=prepared --config.data.path={_OUT.value}",
  ]
  if settings.tokenizer != "bytes":
    parts.append(f"--config.data.tokenizer={settings.tokenizer}")
  config = _flags.load_config(_CONFIG.value) if _CONFIG.value else None
  if not config or config.data.sequence_length != settings.sequence_length:
    parts.append(f"--config.data.sequence_length={settings.sequence_length}")
  if not config or config.model.vocab_size < vocab_size:
    rounded = -(-vocab_size // 64) * 64  # Divides over devices.
    parts.append(f"--config.model.vocab_size={rounded}")
  return " ".join(parts)


def _train_tokenizer() -> int:
  from nl_jax.data import documents, tokenizer_training

  out = pathlib.Path(_TRAIN.value)
  if out.exists():
    raise ValueError(f"{out} exists; give --train_tokenizer a new file")
  if _SOURCE.value not in documents.SUFFIXES:
    raise ValueError(
      f"--source must be one of {', '.join(documents.SUFFIXES)}; got "
      f"{_SOURCE.value!r}"
    )
  files = documents.find(_PATH.value, _SOURCE.value)

  def texts() -> Iterator[str]:
    for path in files.paths:
      for document in documents.read(files, path, _TEXT_KEY.value):
        yield document.text

  size = sum(path.stat().st_size for path in files.paths)
  pieces = tokenizer_training.train(texts(), size, out, _VOCAB.value)
  print(f"{out}: {pieces:,} pieces")
  print(
    f"next: python -m experiments.prepare --tokenizer={out} "
    f"--source={_SOURCE.value} --path={_PATH.value} --out=<folder> "
    "--for_config=<name>"
  )
  return _main.DONE


if __name__ == "__main__":
  _main.run(main)
