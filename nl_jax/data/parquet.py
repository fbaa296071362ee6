"""Documents of parquet files, read a row group at a time."""

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from nl_jax.data import bad_documents

_ROWS = 1024  # Of parquet that are held as text at once.


def row_groups(path: pathlib.Path, key: str) -> list[tuple[int, int]]:
  """(rows, bytes) of each row group of a parquet file.

  Raises:
    ValueError: no parquet, or no such column.
  """
  metadata = _open_parquet(path, key).metadata
  groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
  return [(group.num_rows, group.total_byte_size) for group in groups]


def _open_parquet(path: pathlib.Path, key: str) -> Any:
  from pyarrow import parquet

  is_here = isinstance(path, pathlib.Path)
  with _parquet_errors(f"{path} is not a parquet file"):
    file = parquet.ParquetFile(
      path if is_here else path.open("rb"), page_checksum_verification=True
    )
  if key not in file.schema_arrow.names:
    raise ValueError(
      f"{path} has no column {key!r} (it has: "
      f"{', '.join(file.schema_arrow.names)}); set data.text_key"
    )
  return file


def documents(
  path: pathlib.Path, name: str, key: str, start: int, stop: int | None
) -> bad_documents.Found:
  """The texts of a column of a file, in the row groups from start to stop."""
  file = _open_parquet(path, key)
  groups = range(file.num_row_groups)[start:stop]
  row = sum(file.metadata.row_group(i).num_rows for i in range(start))
  for group in groups:
    for values in _batches(file, group, key, f"{path}, row group {group}"):
      for value in values:
        where = lambda row=row: f"{path}, row {row}"
        yield (
          f"{name}:{row}",
          functools.partial(bad_documents.string, value, key, where),
        )
        row += 1


def _batches(
  file: Any, group: int, key: str, where: str
) -> Iterator[list[Any]]:
  """The values of a row group, some at a time."""
  batches = file.iter_batches(_ROWS, [group], columns=[key])
  while True:
    with _parquet_errors(f"{where} is damaged"):
      batch = next(batches, None)
      if batch is None:
        return
      values = batch.column(0).to_pylist()
    yield values


@contextlib.contextmanager
def _parquet_errors(what: str) -> Iterator[None]:
  """Raises ValueError for what is wrong with a file's bytes.

  Args:
    what: the beginning of the sentence.
  """
  import pyarrow

  try:
    yield
  except FileNotFoundError:
    raise
  # Of a page, of its compression, of the text in it.
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    reason = " ".join(str(error).split())
    raise ValueError(
      f"{what} ({reason}); get the file again or leave it out"
    ) from error
