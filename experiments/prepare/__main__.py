"""Prepares a corpus for training: tokenised, packed rows in shards, once.

    python -m experiments.prepare --config=hope_1b3 --tokenizer=words.model \\
        --source=jsonl --path=corpus --out=prepared
    python -m experiments.lm --config=hope_1b3 --config.data.source=prepared \\
        --config.data.path=prepared --config.data.tokenizer=words.model

The config gives sequence length, alignment and, where it names one, tokenizer;
flags of these names come first. The same command resumes where it was stopped,
and repairs damaged shards. The shards do not depend on the number of workers.
Before that, a tokenizer of one's own:

    python -m experiments.prepare --train_tokenizer=words.model \\
        --vocab_size=32000 --source=jsonl --path=corpus

A corpus for a cluster: the same shards, bit for bit, by an Apache Beam pipeline
(`pip install -e .[beam]`, an environment of its own; docs/launch.md):

    python -m experiments.prepare --config=hope_1b3 --tokenizer=words.model \\
        --source=jsonl --path=gs://bucket/corpus --out=gs://bucket/prepared \\
        --beam="--runner=DataflowRunner --project=... --region=..."
"""

import re
import shlex
import time
from typing import Any

from absl import flags

from experiments.cli import command, named

named.define_config(required=False)
_SOURCE = flags.DEFINE_string(
  "source", "", "text, jsonl or parquet; default: as --path says."
)
_PATH = flags.DEFINE_string("path", "", "A file, or a folder with such files.")
_OUT = flags.DEFINE_string("out", "", "Folder of the prepared corpus.")
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "bytes, a SentencePiece .model or a tokenizer.json."
)
_TEXT_KEY = flags.DEFINE_string(
  "text_key", "text", "Field of jsonl, or column of parquet, with the text."
)
_BAD = flags.DEFINE_enum(
  "bad_documents", "refuse", ["refuse", "skip"],
  "What to do with documents that cannot be used.",
)  # fmt: skip
_SEPARATOR = flags.DEFINE_string(
  "separator", "", "Between the documents of a text file; empty: it is one."
)
_BOS = flags.DEFINE_boolean(
  "bos", False, "Begin documents with the tokenizer's token for that."
)
_SPECIAL = flags.DEFINE_enum(
  "special_tokens", "parse", ["parse", "text"],
  "How special tokens of a tokenizer.json are treated in a text.",
)  # fmt: skip
_LENGTH = flags.DEFINE_integer(
  "sequence_length", 0, "Tokens of a row; 0: of --config."
)
_ALIGNMENT = flags.DEFINE_integer(
  "alignment", 0, "Documents start at multiples; 0: of --config, or 1."
)
_PERCENT = flags.DEFINE_float(
  "validation_percent", 10.0, "Percent of the text to hold out."
)
_SHARD = flags.DEFINE_integer(
  "shard_megabytes", 64, "Megabytes of input in a shard, about.", lower_bound=1
)
_WORKERS = flags.DEFINE_integer(
  "workers", 0, "Processes; 0: as many as cores.", lower_bound=0
)
_BEAM = flags.DEFINE_string(
  "beam", None, "Options of Apache Beam, which then makes the shards."
)
_TRAIN = flags.DEFINE_string(
  "train_tokenizer", "", "Train a SentencePiece model into this new file."
)
_VOCAB = flags.DEFINE_integer(
  "vocab_size", 32_000, "Pieces of the model that is trained."
)


# Fields that the library's sentences name, and that are flags here.
_FIELDS = re.compile(
  r"\bdata\.(source|path|text_key|bad_documents|separator|tokenizer|bos|"
  r"special_tokens|sequence_length)\b"
)


def main() -> int:
  """Runs the command; returns its exit status."""
  try:
    _require_path()
    return _train_tokenizer() if _TRAIN.value else _prepare()
  except ValueError as error:
    raise ValueError(_FIELDS.sub(r"--\1", str(error))) from error
  except FileNotFoundError as error:
    raise FileNotFoundError(_FIELDS.sub(r"--\1", str(error))) from error


def _prepare() -> int:
  if not _OUT.value:
    raise ValueError("--out is required: the folder of the prepared corpus")
  begin, settings = time.monotonic(), _settings()
  command.say(f"looking through --path={settings.path} ...")
  made = _make(settings)
  _report(made.manifest)
  if made.made < made.shards:
    print(f"{made.shards - made.made} of {made.shards} shards were there")
  speed = made.bytes / 2**20 / (time.monotonic() - begin)
  print(f"{speed:.1f} MiB/s with {made.workers}")
  print(_next_command(settings, made.manifest["vocab_size"]))
  return command.DONE


def _make(settings: Any) -> Any:
  """Makes the shards and the manifest, here or by Beam."""
  if _BEAM.value is None:
    from experiments.prepare import pool

    _require_local()
    return pool.make(settings, _OUT.value, _WORKERS.value)
  if _WORKERS.value:
    raise ValueError(
      "--workers are of this command, and --beam brings its own; give one of "
      "them (Beam's number is --direct_num_workers or --max_num_workers)"
    )
  try:
    from experiments.prepare import beam
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "apache_beam":
      raise
    raise ValueError(
      "--beam needs Apache Beam: run `pip install -e .[beam]` in an "
      "environment of its own, without -c requirements.txt, whose protobuf and "
      "pyarrow are newer than Beam allows"
    ) from error
  return beam.make(settings, _OUT.value, _BEAM.value)


def _require_local() -> None:
  for flag, value in (("path", _PATH.value), ("out", _OUT.value)):
    if "://" in value:
      raise ValueError(
        f"--{flag}={value} is in a store, which only --beam reads and writes; "
        "give --beam=, or a folder of this machine (gcsfuse mounts a bucket)"
      )


def _report(manifest: dict[str, Any]) -> None:
  from nl_jax.data import prepared

  for split, counts in manifest["counts"].items():
    print(
      f"{split}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, "
      f"{counts['tokens']:,} tokens in {counts['rows']:,} rows"
    )
  if bad := manifest.get("bad_documents"):
    print(f"left out {bad['count']:,} bad documents")
    for place in bad["places"]:
      print(f"  {place}")
  print(f"manifest: {prepared.manifest_hash(manifest)}")


def _settings() -> Any:
  """The settings of the flags and of --config."""
  from nl_jax.data import partition

  length, alignment = _LENGTH.value, _ALIGNMENT.value
  tokenizer, config = _TOKENIZER.value, flags.FLAGS.config
  if config:
    from nl_jax import build

    # Any: to ask for the one of this machine would take its accelerator.
    config.train.dtype = "float32"
    net = build.model(config)
    length = length or config.data.sequence_length
    alignment = alignment or net.alignment
    tokenizer = tokenizer or config.data.tokenizer
  if not length:
    raise ValueError(
      "--sequence_length is required, or --config=<name> to take it from a "
      f"config: {', '.join(named.config_names())}"
    )
  if not tokenizer and config:
    raise ValueError(
      f"--tokenizer is required: --config={named.chosen_name()} names none; "
      "give bytes, a SentencePiece .model or a tokenizer.json, or train one "
      "with --train_tokenizer"
    )
  return partition.Settings(
    kind=_kind(),
    path=_PATH.value,
    tokenizer=tokenizer or "bytes",
    sequence_length=length,
    alignment=alignment or 1,
    text_key=_TEXT_KEY.value,
    validation_percent=_PERCENT.value,
    shard_bytes=_SHARD.value * 2**20,
    bad_documents=_BAD.value,
    separator=_SEPARATOR.value,
    bos=_BOS.value,
    special_tokens=_SPECIAL.value,
  )


def _kind() -> str:
  """Of the files: the one given, or the one that --path says."""
  if _SOURCE.value:
    return _SOURCE.value
  from nl_jax import data, files
  from nl_jax.data import partition

  # Nothing there, or a store: reported where it is read.
  if "://" in _PATH.value or not files.expand(_PATH.value).exists():
    return "text"

  found = data.infer(_PATH.value)
  if found not in partition.KINDS:
    raise ValueError(
      f"--path={_PATH.value} is of data.source={found}, and prepared are "
      f"{', '.join(partition.KINDS)} only"
    )
  command.say(f"--source={found}, as --path says")
  return found


def _require_path() -> None:
  if not _PATH.value:
    raise ValueError("--path is required: a file, or a folder with files")


def _next_command(settings: Any, vocab_size: int) -> str:
  """The command that trains on what was prepared."""
  config = flags.FLAGS.config
  name = shlex.quote(named.chosen_name()) if config else "<name>"
  parts = [
    f"next: python -m experiments.lm --config={name}",
    "--config.data.source=prepared",
    f"--config.data.path={shlex.quote(_OUT.value)}",
  ]
  if not config or config.data.tokenizer != settings.tokenizer:
    parts.append(f"--config.data.tokenizer={shlex.quote(settings.tokenizer)}")
  if settings.bos:
    parts.append("--config.data.bos=True")
  if settings.special_tokens != "parse":
    parts.append(f"--config.data.special_tokens={settings.special_tokens}")
  if not config or config.data.sequence_length != settings.sequence_length:
    parts.append(f"--config.data.sequence_length={settings.sequence_length}")
  if not config or config.model.vocab_size < vocab_size:
    rounded = -(-vocab_size // 64) * 64  # Divides over devices.
    parts.append(f"--config.model.vocab_size={rounded}")
  return " ".join(parts)


def _train_tokenizer() -> int:
  from nl_jax import files
  from nl_jax.data import errors, partition, tokenizer_training

  out = files.expand(_TRAIN.value)
  if out.exists():
    raise ValueError(f"{out} exists; give --train_tokenizer a new file")
  kind = _kind()
  if kind not in partition.KINDS:
    raise errors.unknown_name("data.source", kind, partition.KINDS)
  settings = partition.Settings(
    kind, _PATH.value, "", 1, 1, _TEXT_KEY.value, _PERCENT.value,
    bad_documents=_BAD.value, separator=_SEPARATOR.value,
  )  # fmt: skip
  size = sum(p.size for pieces in partition.plan(settings) for p in pieces)
  with command.busy(f"learning {_VOCAB.value:,} pieces from {size:,} bytes"):
    pieces = tokenizer_training.train(
      partition.training_texts(settings), size, out, _VOCAB.value
    )
  print(f"{out}: {pieces:,} pieces")
  print(
    "next: python -m experiments.prepare --config=<name> "
    f"--tokenizer={shlex.quote(_TRAIN.value)} --source={kind} "
    f"--path={shlex.quote(_PATH.value)} --out=<folder>"
  )
  return command.DONE


if __name__ == "__main__":
  command.run(main)
