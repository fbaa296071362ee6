"""The data folder: one file a task, found, checked and identified by hash.

A file has one JSON object a line, with the columns of its data set on Hugging
Face. What a file is worth (`exact`, `approximate`, `sample`) is known by its
SHA-256; of another file it is `user`.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nl_jax.eval import requests, wikitext

EXACT, APPROXIMATE, SAMPLE, USER = "exact", "approximate", "sample", "user"
_FIDELITY = {  # By the first 16 digits of the SHA-256.
  "85f09ca4c886eb81": EXACT,
  "173c87a53759e020": EXACT,  # wiki.test.raw.
  "9acdcb12e8c2ef4e": EXACT,
  "61533005e22f1755": EXACT,
  "69f3d7f3a900d775": EXACT,
  "e56f5a16d9427c61": EXACT,
  "9d3e189d5e0844a4": EXACT,
  "17c8ece78c7b3f61": EXACT,
  "1f9419167b91d096": APPROXIMATE,  # BoolQ without titles.
  "ff7713020ac95dae": SAMPLE,  # BoolQ, the first 22.
  "36693ca49f3ac906": APPROXIMATE,  # HellaSwag, prepared by others.
}
_LABELS = "valid-labels.lst"  # Of PIQA's own files.
_LABEL_COLUMNS = ("label", "answer", "answerKey")
# How a row of HellaSwag names its split.
_SPLITS = {"val": "validation", "validation": "validation"}
_TITLED = 0.95  # Share of BoolQ's passages that begin with their title.
_TITLE = 150  # Characters that a title ends within.


class Loaded(NamedTuple):
  """A task's file.

  Attributes:
    path: of the file.
    sha256: of it (hex).
    bytes: of it.
    fidelity: exact, approximate, sample or user.
    docs: (line, document), the first `limit` of them.
    n_docs: documents in the file.
    warnings: what keeps the numbers from being comparable, as sentences.
  """

  path: pathlib.Path
  sha256: str
  bytes: int
  fidelity: str
  docs: list[tuple[int, Mapping[str, Any]]]
  n_docs: int
  warnings: list[str]


def find(task: requests.Task, folder: pathlib.Path) -> pathlib.Path:
  """The file of a task: `<task>.jsonl`, else another known name of it.

  Raises:
    FileNotFoundError: there is none.
  """
  for name in (f"{task.name}.jsonl", *task.files):
    if (folder / name).is_file():
      return folder / name
  near = [p.name for p in sorted(folder.glob(f"*{task.name}*"))][:3]
  seen = f" (there is {', '.join(near)})" if near else ""
  raise FileNotFoundError(
    f"no file {task.name}.jsonl in {folder}{seen}: put the {task.split} split "
    f"of {task.source} there, a JSON object a line"
  )


def load(task: requests.Task, folder: pathlib.Path, limit: int = 0) -> Loaded:
  """Reads and checks the file of a task.

  Args:
    task: of `requests.TASKS`.
    folder: the data folder.
    limit: documents to keep; 0: all.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a file of another split, a line that is not a JSON object, or a
      column that is missing or of another type; file and line are named.
  """
  path = find(task, folder)
  content = path.read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  try:
    text = content.decode("utf-8")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise ValueError(f"{path}:{line}: not UTF-8") from error
  raw = path.suffix == ".raw"
  lines = list(wikitext.pages(text)) if raw else _lines(text)
  _check_split(task, path, len(lines))
  kept = lines[:limit] if limit else lines
  docs: list[tuple[int, Mapping[str, Any]]]
  if raw:
    docs = [(line, {"page": page}) for line, page in kept]
  else:
    docs = [(line, _parse(path, line, text)) for line, text in kept]
    docs = list(_labelled(path, docs))
  for line, doc in docs:
    _check(task, path, line, doc)
  fidelity = _FIDELITY.get(digest[:16], USER)
  warnings = _warnings(task, path, docs, len(lines))
  return Loaded(
    path, digest, len(content), fidelity, docs, len(lines), warnings
  )


def _lines(text: str) -> list[tuple[int, str]]:
  """(number from 1, line) of lines that are not blank.

  Split at newlines only: a text may hold other characters that end a line.
  """
  numbered = enumerate(text.split("\n"), 1)
  return [(number, line) for number, line in numbered if line.strip()]


def _parse(path: pathlib.Path, line: int, text: str) -> Mapping[str, Any]:
  try:
    doc = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}:{line}: not JSON ({error})") from error
  if not isinstance(doc, dict):
    raise ValueError(
      f"{path}:{line}: expected a JSON object, got {type(doc).__name__}"
    )
  return doc


def _labelled(
  path: pathlib.Path, docs: list[tuple[int, Mapping[str, Any]]]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
  """Documents with the labels of the file beside theirs, PIQA's way."""
  beside = path.with_name(_LABELS)
  if path.name != "valid.jsonl" or not beside.is_file():
    yield from docs
    return
  labels = beside.read_text(encoding="utf-8").split()
  for i, (line, doc) in enumerate(docs):
    if i >= len(labels) or labels[i] not in ("0", "1"):
      raise ValueError(
        f"{beside}:{i + 1}: expected 0 or 1, the label of line {line} of "
        f"{path.name}"
      )
    yield line, {**doc, "label": int(labels[i])}


def _check(
  task: requests.Task, path: pathlib.Path, line: int, doc: Mapping[str, Any]
) -> None:
  """Raises ValueError for a document that is not one of the task's."""
  for column, kinds in task.columns.items():
    if column not in doc:
      raise ValueError(
        f"{path}:{line}: no column {column!r}; {task.name} needs "
        f"{', '.join(task.columns)}, as {task.source} has them"
      )
    # A missing label is reported as missing.
    unlabelled = doc[column] is None and column in _LABEL_COLUMNS
    if not isinstance(doc[column], kinds) and not unlabelled:
      raise ValueError(
        f"{path}:{line}: {column!r} is {doc[column]!r}, of type "
        f"{type(doc[column]).__name__}; {task.source} has another there"
      )
  split = doc.get("split", task.split)
  if _SPLITS.get(split, split) != task.split:
    raise ValueError(
      f"{path}:{line}: a document of the split {split!r}; {task.name} is "
      f"scored on the {task.split} split of {task.source}"
    )


def _check_split(task: requests.Task, path: pathlib.Path, count: int) -> None:
  for split, size in task.others.items():
    if count == size:
      raise ValueError(
        f"{path} has {count} documents, as the {split} split of {task.source}; "
        f"{task.name} is scored on the {task.split} split, of {task.docs}"
      )
  if not count:
    raise ValueError(f"{path} has no documents")


def _warnings(
  task: requests.Task,
  path: pathlib.Path,
  docs: list[tuple[int, Mapping[str, Any]]],
  count: int,
) -> list[str]:
  found = []
  if count != task.docs:
    found.append(
      f"{path} has {count} documents, the {task.split} split of {task.source} "
      f"{task.docs}"
    )
  if task.name == "boolq":
    titled = sum(" -- " in doc["passage"][:_TITLE] for _, doc in docs)
    if titled < _TITLED * len(docs):
      found.append(
        f"{path}: only {titled} of {len(docs)} passages begin with a title; "
        "SuperGLUE's do, google/boolq's do not and give other numbers"
      )
  return found
