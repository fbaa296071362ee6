"""A data set: one source, tokenizer and packing, bound to its batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np

from nl_jax import fields, files
from nl_jax.data import bad_documents as bad_lib
from nl_jax.data import errors, packing, prepared, sources, tokenizers

if TYPE_CHECKING:
  import grain

NAMES = (*sources.NAMES, "prepared", "mixture")
ROWS = ("packed", "stream")
RESETS = ("document", "never")  # Of streams.
_FORMAT = 1  # Raise it when the packer lays the same tokens out otherwise.


class Counts(NamedTuple):
  """Sizes of a split.

  Attributes:
    documents: number of documents.
    bytes: their UTF-8 bytes.
    tokens: pairs to predict, end ids included; padding is not counted.
    rows: packed rows.
  """

  documents: int
  bytes: int
  tokens: int
  rows: int


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What a training run reads; made by `load`.

  Attributes:
    source: the documents.
    tokenizer: text to ids and back.
    train: endless iterator of this process's batches; `get_state()` is
      {"next_row": rows drawn}, `set_state` takes it, on any process count and
      with any batch size.
    fingerprint: SHA-256 (hex) of all that decides the training batches but
      their size: source, tokenizer, packing, seed and shuffle.
    counts: sizes of the splits "train" and "validation".
    rows: the packed rows of the splits.
    batch_size: rows of a global batch.
    process_index: this process.
    process_count: number of processes.
  """

  source: sources.Source
  tokenizer: tokenizers.Tokenizer
  train: grain.DatasetIterator = dataclasses.field(repr=False)
  fingerprint: str
  counts: dict[str, Counts]
  rows: dict[str, packing.Rows | packing.Table] = dataclasses.field(repr=False)
  batch_size: int
  process_index: int
  process_count: int

  def validation(self, batches: int = 0) -> Sequence[dict[str, np.ndarray]]:
    """The held-out batches of this process, always the same.

    Args:
      batches: how many, spread evenly over the split; 0: the whole split.
    """
    from nl_jax.data import pipeline

    return pipeline.eval_batches(
      self.rows["validation"],
      batch_size=self.batch_size,
      limit=batches,
      process_index=self.process_index,
      process_count=self.process_count,
    )

  def describe(self) -> str:
    """One line for logs: source, tokenizer, tokens and rows of the splits."""
    sizes = ", ".join(
      f"{split} {c.tokens:,} tokens in {c.rows:,} rows"
      for split, c in self.counts.items()
    )
    remark = self.tokenizer.remark and f" ({self.tokenizer.remark})"
    return (
      f"{self.source.describe()}; tokenizer {self.tokenizer.name}{remark}: "
      f"{sizes}; "
      f"fingerprint {self.fingerprint[:12]}"
    )


class _Part(NamedTuple):
  """One corpus of a data set.

  Attributes:
    source: its documents.
    weight: its share of the rows drawn.
    rows: of each split.
    counts: of each split.
  """

  source: sources.Source
  weight: float
  rows: Mapping[str, packing.Rows | packing.Table]
  counts: dict[str, Counts]


def load(
  *,
  source: str,
  path: str = "",
  text_key: str = "text",
  bad_documents: Annotated[str, fields.OneOf(*bad_lib.POLICIES)] = "refuse",
  separator: str = "",
  tokenizer: str = "bytes",
  bos: bool = False,
  special_tokens: Annotated[str, fields.OneOf("parse", "text")] = "parse",
  sequence_length: Annotated[int, fields.Whole(1)],
  batch_size: Annotated[int, fields.Whole(1)],
  rows: Annotated[str, fields.OneOf(*ROWS)] = "packed",
  reset: Annotated[str, fields.OneOf(*RESETS)] = "document",
  consecutive: int = 1,
  seed: Annotated[int, fields.SEED] = 0,
  alignment: int = 1,
  vocab_size: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Dataset:
  """Loads, tokenises and packs a source; the config group `data`.

  Args:
    source: "embedded", "synthetic", "text", "jsonl", "parquet",
      "array_record", "hugging_face" (see `sources.load`), "prepared" (a folder
      of experiments.prepare) or "mixture"; "", or left out where a path is
      given: what the path says (`infer`).
    path: file or folder of the source; of "mixture" its parts with their
      weights: "jsonl:web.jsonl=0.7,text:books=0.3".
    text_key: field or column with the text, where there are many.
    bad_documents: what to do with documents that cannot be used: "refuse" the
      first, naming its place, or "skip" all and report how many there are and
      where the first three are.
    separator: between the documents of a file of "text", as "<|endoftext|>",
      with the line breaks around it; "": a file is one.
    tokenizer: "bytes", or the path of a SentencePiece model or tokenizer.json.
    bos: whether documents begin with the tokenizer's token for that, which
      `sample` and `read` begin with, too.
    special_tokens: how special tokens of a tokenizer.json are treated where a
      text contains them: "parse", or take as "text".
    sequence_length: tokens of a row, a multiple of the model's alignment.
    batch_size: rows of a step, over all processes.
    rows: "packed", in a new order each epoch, or "stream", in the order in
      which they follow each other, with memories carried on (`streams.make`).
    reset: when the memories of streams are reset: at each "document", or
      "never".
    consecutive: rows of each stream in a batch.
    seed: seed of the order of the rows, and of the documents of "synthetic".
    alignment: documents start at its multiples: `model.alignment`.
    vocab_size: of the model, checked against the tokenizer's when given.
    process_index: this process.
    process_count: number of processes; each reads all text, draws its slice.

  Raises:
    ValueError: a value that does not fit; the sentence names the keys.
    FileNotFoundError: a missing file.
  """
  # Grain takes seconds to import: only when batches are wanted.
  from nl_jax.data import pipeline, streams

  numbers = dict(
    sequence_length=sequence_length,
    batch_size=batch_size,
    bad_documents=bad_documents,
    rows=rows,
    reset=reset,
    seed=seed,
  )
  fields.check("data", load, numbers)
  packing.check_lengths(sequence_length, alignment)
  pipeline.check_batch(batch_size, process_index, process_count)
  source = source or infer(path)
  if source not in NAMES:
    raise errors.unknown_name("data.source", source, NAMES)
  ids = tokenizers.load(tokenizer, bos=bos, special_tokens=special_tokens)
  if vocab_size is not None:
    tokenizers.check_vocabulary(ids, vocab_size)
  mixed = source == "mixture"
  named = parse_mixture(path) if mixed else [(source, path, 1.0)]
  apart = (rows, reset) != ("stream", "never")
  how = _How(
    ids,
    sequence_length,
    alignment,
    apart,
    seed,
    text_key,
    bad_documents,
    separator,
  )
  made_before = source in ("prepared", *sources.WITHOUT_PATH)
  if bad_documents != bad_lib.POLICIES[0] and made_before:
    raise ValueError(
      f"data.bad_documents={bad_documents} applies to files of text; got "
      f"data.source={source!r}"
    )
  if separator and "text" not in [name for name, *_ in named]:
    raise sources.no_separator(separator, source)
  parts = [_part(*part, how) for part in named]
  tables, counts = _joined(parts)
  if not counts["validation"].rows:
    raise ValueError(
      f"the text held out of data.source={source!r} data.path={path!r} has no "
      "tokens; give more text"
    )
  pipeline.check_rows(tables["train"], batch_size, alignment, process_count)
  mix = pipeline.Mix(
    tuple(packing.count(part.rows["train"]) for part in parts),
    tuple(part.weight for part in parts),
  )
  part = dict(process_index=process_index, process_count=process_count)
  if rows == "packed":
    train = pipeline.batches(
      tables["train"], batch_size=batch_size, seed=seed, mix=mix, **part
    )
  else:
    train = streams.make(
      tables["train"],
      batch_size=batch_size,
      end_id=ids.end_id,
      reset=reset,
      consecutive=consecutive,
      mix=mix,
      **part,
    )
  whole = _mixed(path, parts) if mixed else parts[0].source
  decides = [_FORMAT, whole.fingerprint, ids.fingerprint]
  decides += [sequence_length, alignment]
  if rows == "packed":
    decides += [pipeline.order_sample(mix, seed)]
  else:
    decides += [rows, reset, batch_size, consecutive]
  return Dataset(
    source=whole,
    tokenizer=ids,
    train=train,
    fingerprint=hashlib.sha256(json.dumps(decides).encode()).hexdigest(),
    counts=counts,
    rows=tables,
    batch_size=batch_size,
    process_index=process_index,
    process_count=process_count,
  )


class _How(NamedTuple):
  """How a part becomes rows: arguments of `load`, and the tokenizer.

  `apart` is false where the training documents follow each other without
  padding: no memory is reset between them.
  """

  tokenizer: tokenizers.Tokenizer
  sequence_length: int
  alignment: int
  apart: bool
  seed: int
  text_key: str
  bad_documents: str
  separator: str


def parse_mixture(path: str) -> list[tuple[str, str, float]]:
  """(source, path, weight) of each part of "source:path=weight,...".

  Raises:
    ValueError: not of that form, or a weight that is not positive.
  """
  parts = []
  for text in path.split(","):
    body, equals, weight = text.strip().rpartition("=")
    name, _, where = body.partition(":")
    known = [n for n in NAMES if n != "mixture"]
    if equals and name not in known:
      raise errors.unknown_name("source in data.path", name, known)
    try:
      parts.append((name, where, float(weight)))
    except ValueError:
      equals = ""
    if not equals or not 0 < parts[-1][2] < float("inf"):
      raise ValueError(
        "data.source=mixture needs data.path=source:path=weight,... with "
        f"weights above 0, as in jsonl:web.jsonl=0.7,text:books=0.3; got "
        f"{text!r}"
      )
  return parts


def infer(path: str) -> str:
  """The source that a path says: by its ending, or by what a folder holds.

  Args:
    path: file or folder, or the parts of a mixture.

  Returns:
    One of `NAMES`.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: it says nothing, or more than one thing.
  """
  if not path:
    raise ValueError(
      "data.source and data.path are empty; give the file or folder with text "
      "as data.path, or data.source=embedded"
    )
  where = files.expand(path)
  if not where.exists():
    if path.partition(":")[0] in NAMES and "=" in path:
      return "mixture"
    raise FileNotFoundError(f"nothing at data.path={path!r}")
  said = sources.said_by(where)
  if (where / prepared.MANIFEST).is_file():
    said = ["prepared"]
  if len(said) == 1:
    return said[0]
  what = f"holds files of {', '.join(said)}" if said else "says no data.source"
  raise ValueError(
    f"data.path={path!r} {what}; set data.source to one of "
    f"{', '.join(said or NAMES)}"
  )


def _part(name: str, path: str, weight: float, how: _How) -> _Part:
  if name == "prepared":
    return _prepared(path, weight, how)
  separator = how.separator if name == "text" else ""
  source = sources.load(
    name, path, how.seed, how.text_key, how.bad_documents, separator
  )
  rows, counts = {}, {}
  for split in sources.SPLITS:
    together = split == "train" and not how.apart
    rows[split], counts[split] = _pack(source.documents(split), how, together)
  return _Part(source, weight, rows, counts)


def _prepared(path: str, weight: float, how: _How) -> _Part:
  manifest = prepared.read_manifest(path)
  if not how.apart and how.alignment > 1:
    raise ValueError(
      "data.reset=never reads documents without padding between them, and "
      f"the rows in {path} have it, for a memory chunk of {how.alignment} "
      "tokens: use data.reset=document, or the text itself"
    )
  prepared.check(
    manifest,
    sequence_length=how.sequence_length,
    alignment=how.alignment,
    tokenizer_fingerprint=how.tokenizer.fingerprint,
  )
  folder = files.expand(path)
  tables = {s: prepared.Table(folder, s, manifest) for s in sources.SPLITS}
  counts = {s: Counts(**manifest["counts"][s]) for s in sources.SPLITS}
  fingerprint = prepared.manifest_hash(manifest)
  opening = (manifest["opening"],)
  source = sources.Source("prepared", path, fingerprint, (), opening)
  return _Part(source, weight, tables, counts)


def _joined(
  parts: list[_Part],
) -> tuple[dict[str, packing.Rows | packing.Table], dict[str, Counts]]:
  """The rows of all parts, one after the other, and their sizes."""
  rows = {
    split: packing.join([part.rows[split] for part in parts])
    for split in sources.SPLITS
  }
  counts = {
    split: Counts(*map(sum, zip(*(part.counts[split] for part in parts))))
    for split in sources.SPLITS
  }
  return rows, counts


def _mixed(path: str, parts: list[_Part]) -> sources.Source:
  """The source of all parts."""
  prints = [[part.source.fingerprint, part.weight] for part in parts]
  fingerprint = hashlib.sha256(json.dumps(prints).encode()).hexdigest()
  train, validation = (
    tuple(body for part in parts for body in part.source.documents(split))
    for split in sources.SPLITS
  )
  places = [place for part in parts for place in part.source.bad_places]
  return sources.Source(
    "mixture",
    path,
    fingerprint,
    train,
    validation,
    bad=sum(part.source.bad for part in parts),
    bad_places=tuple(places),
  )


def _pack(
  documents: tuple[str, ...], how: _How, together: bool
) -> tuple[packing.Rows, Counts]:
  """The rows of a split, `together`: full ones only, without padding."""
  rows = packing.pack(
    packing.tokenize(documents, how.tokenizer),
    how.sequence_length,
    1 if together else how.alignment,
    how.tokenizer.pad_id,
  )
  if together:
    full = int(np.count_nonzero(rows["segment_ids"][:, -1]))
    rows = {key: x[:full] for key, x in rows.items()}
  counts = Counts(
    documents=len(documents),
    bytes=sum(len(document.encode("utf-8")) for document in documents),
    tokens=int(np.count_nonzero(rows["segment_ids"])),
    rows=len(rows["inputs"]),
  )
  return rows, counts
