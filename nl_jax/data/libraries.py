"""Corpora that other libraries wrote: ArrayRecord files, and Arrow folders."""

import contextlib
from collections.abc import Iterator
from typing import Any

from nl_jax import files
from nl_jax.data import bad_documents, documents, examples, prepared

Named = list[tuple[str, str]]  # Names and texts.
# Of what save_to_disk wrote.
FOLDER_MARKS = ("dataset_dict.json", "dataset_info.json")


def array_record(path: str, text_key: str, bad: bad_documents.OnBad) -> Named:
  """The documents of ArrayRecord files: of one, or those of a folder.

  Args:
    path: file or folder.
    text_key: the feature with the text, where a record is a
      `tf.train.Example`; any other record is UTF-8 text.
    bad: takes the documents that cannot be used.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: no such files, or no text in them, or unusable.
  """
  import grain

  where = files.expand(path)
  if not path or not where.exists():
    raise FileNotFoundError(
      f"nothing at data.path={path!r}; data.source=array_record needs an "
      "ArrayRecord file or a folder with .array_record files"
    )
  if not where.is_dir():
    documents.require_file(where)
    found = [where]
  else:
    found = documents.below(where, is_record)
  if not found:
    raise ValueError(f"no .array_record file in the folder data.path={path!r}")
  if (found[0].parent / prepared.MANIFEST).exists():
    raise ValueError(
      f"data.path={path!r} holds prepared rows, not text; set "
      f"data.source=prepared and data.path={str(found[0].parent)!r}"
    )
  named = []
  for file in found:
    try:
      records = grain.sources.ArrayRecordDataSource([str(file)])
      contents = [records[i] for i in range(len(records))]
    except (ValueError, RuntimeError, IndexError) as error:
      raise ValueError(
        f"{file} is not an ArrayRecord file, or a damaged one ({error})"
      ) from error
    for i, content in enumerate(contents):
      try:
        text = _record(content, f"{file}, record {i}", text_key)
      except bad_documents.BadDocumentError as error:
        bad(error)
      else:
        named.append((f"{file.name}:{i}", text))
  return named


def is_record(name: str) -> bool:
  """Whether a file is one of ArrayRecord, by its name."""
  return ".array_record" in name.lower()


def _record(content: bytes, where: str, key: str) -> str:
  """The text of a record."""
  features = examples.features(content)
  if features is None:
    return documents.decode(content, where)
  if key not in features:
    raise bad_documents.BadDocumentError(
      f"{where} is a tf.train.Example without a feature {key!r} (it has: "
      f"{', '.join(features)}); set data.text_key"
    )
  chosen = features[key]
  if chosen.kind != "bytes" or len(chosen.values) != 1:
    raise bad_documents.BadDocumentError(
      f"{where}: the feature {key!r} holds {len(chosen.values)} texts "
      f"({chosen.kind}), expected one; set data.text_key"
    )
  return documents.decode(chosen.values[0], f"{where}, {key!r}")


def hugging_face(
  path: str, text_key: str, bad: bad_documents.OnBad
) -> list[Named]:
  """Those of a folder that Hugging Face `datasets` wrote with `save_to_disk`.

  Args:
    path: the folder.
    text_key: the column with the text.
    bad: takes the documents that cannot be used.

  Returns:
    Of a DatasetDict those of "train", and of "validation" (or else "test"); of
    a Dataset all.

  Raises:
    ModuleNotFoundError: `datasets` is not installed.
    FileNotFoundError: nothing there.
    ValueError: no such folder, or no such column.
  """
  where = files.expand(path)
  if not path or not where.is_dir():
    raise FileNotFoundError(
      f"no folder data.path={path!r}; data.source=hugging_face needs a folder "
      "that save_to_disk of the library datasets wrote"
    )
  import datasets

  what = "is not a folder of save_to_disk, or a damaged one"
  with _folder_errors(path, what):
    loaded = datasets.load_from_disk(str(where))
  if not isinstance(loaded, datasets.DatasetDict):
    return [_column(loaded, path, text_key, bad)]
  held_out = [x for x in ("validation", "test") if x in loaded]
  if "train" not in loaded or not held_out:
    raise ValueError(
      f"data.path={path!r} has the splits {', '.join(loaded)}; it needs train "
      "and validation or test"
    )
  return [
    _column(loaded[name], path, text_key, bad)
    for name in ("train", held_out[0])
  ]


def _column(rows: Any, path: str, key: str, bad: bad_documents.OnBad) -> Named:
  if key not in rows.column_names:
    raise ValueError(
      f"data.path={path!r} has no column {key!r} (it has: "
      f"{', '.join(rows.column_names)}); set data.text_key"
    )
  with _folder_errors(path, f"is damaged in column {key!r}"):
    # Of the offsets and the text, which nothing else looks at.
    rows.data.column(key).validate(full=True)
    bodies = list(rows[key])
  named = []
  for i, body in enumerate(bodies):
    where = lambda i=i: f"data.path={path!r}, row {i}"
    try:
      named.append((str(i), bad_documents.string(body, key, where)))
    except bad_documents.BadDocumentError as error:
      bad(error)
  return named


@contextlib.contextmanager
def _folder_errors(path: str, what: str) -> Iterator[None]:
  """What the library raises for a folder, as a ValueError that names it."""
  import pyarrow

  known = (pyarrow.ArrowException, OSError, ValueError, LookupError)
  try:
    yield
  except (*known, AttributeError, TypeError, RecursionError) as error:
    reason = " ".join(str(error).split())
    raise ValueError(
      f"data.path={path!r} {what} ({type(error).__name__}: {reason}); save it "
      "again, or give another"
    ) from error
