"""Safetensors files with seals: what is read is what was written.

The header holds the SHA-256 of every array, with its name, dtype and shape, and
one of the header's own texts. Files of other programs have no seals; they are
read as they are.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nl_jax import files

CODES = {
  "float64": "F64",
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
  "int64": "I64",
  "int32": "I32",
  "int16": "I16",
  "int8": "I8",
  "uint64": "U64",
  "uint32": "U32",
  "uint16": "U16",
  "uint8": "U8",
  "bool": "BOOL",
}
_SEALS, _HASH = "seals", "sha256"  # Keys of the header's texts.
_MULTIPLE = 8  # The format's: bytes that the header is padded to.


def write(
  path: str | os.PathLike,
  arrays: Mapping[str, Any],
  texts: Mapping[str, str],
  dtype: Any = None,
) -> None:
  """Writes a sealed file; killed at any moment, it is whole or not there.

  Arrays are made contiguous one by one, so views cost no memory.

  Args:
    path: of the file.
    arrays: by name.
    texts: for the file's header.
    dtype: of all arrays in the file; None: their own.

  Raises:
    StorageError: the system refuses.
  """
  seals = {name: seal(name, _bytes(x, dtype)) for name, x in arrays.items()}
  texts = {**texts, _SEALS: json.dumps(seals)}
  texts[_HASH] = files.json_hash(texts)
  with files.writing(path), files.replacing(pathlib.Path(path)) as file:
    file.write(_header(arrays, dtype, texts))
    for x in arrays.values():
      file.write(_bytes(x, dtype).tobytes())


def seal(name: str, x: np.ndarray) -> str:
  """SHA-256 (hex) of an array with its name, dtype and shape."""
  digest = hashlib.sha256(f"{name}\0{x.dtype}{x.shape}\0".encode())
  digest.update(x.tobytes())
  return digest.hexdigest()


def open_texts(path: str | os.PathLike, found: Any) -> dict[str, str]:
  """The texts of a header, and the seals apart from them.

  Args:
    path: of the file.
    found: of `safetensors.safe_open(path).metadata()`.

  Returns:
    The texts; `seals_of` takes them.

  Raises:
    BrokenSealError: they are not what was written.
  """
  texts = dict(found or {})
  if _SEALS not in texts and _HASH not in texts:
    return texts
  expected = texts.pop(_HASH, "")
  if expected != files.json_hash(texts):
    raise _broken(path, "its header")
  return texts


def seals_of(texts: Mapping[str, str]) -> dict[str, str] | None:
  """The seals of the arrays by name; None of a file without any."""
  return json.loads(texts[_SEALS]) if _SEALS in texts else None


def check(
  path: str | os.PathLike,
  name: str,
  x: np.ndarray,
  seals: Mapping[str, str] | None,
) -> None:
  """Raises BrokenSealError for an array that is not what was written."""
  if seals is not None and seals.get(name) != seal(name, x):
    raise _broken(path, name)


def read(
  path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """All arrays of a file in their own dtypes, and the texts of its header.

  Raises:
    BrokenSealError: they are not what was written.
    safetensors.SafetensorError: it is no such file, or a torn one.
  """
  import safetensors

  with safetensors.safe_open(str(path), "numpy") as file:
    texts = open_texts(path, file.metadata())
    arrays = {name: file.get_tensor(name) for name in file.keys()}
  seals = seals_of(texts)
  for name, x in arrays.items():
    check(path, name, x, seals)
  if seals is not None and set(seals) != set(arrays):
    raise _broken(path, "the list of its arrays")
  return arrays, texts


def _broken(path: str | os.PathLike, what: str) -> files.BrokenSealError:
  return files.BrokenSealError(
    f"{path} is damaged: {what} is not what was written; take a copy that is "
    "whole, or write it again"
  )


def _bytes(x: Any, dtype: Any) -> np.ndarray:
  return np.asarray(x, dtype, order="C")


def _header(
  arrays: Mapping[str, Any], dtype: Any, texts: Mapping[str, str]
) -> bytes:
  header: dict[str, Any] = {"__metadata__": dict(texts)}
  at = 0
  for name, x in arrays.items():
    stored = x.dtype if dtype is None else np.dtype(dtype)
    end = at + int(np.prod(x.shape, dtype=np.int64)) * stored.itemsize
    header[name] = {
      "dtype": CODES[stored.name],
      "shape": list(x.shape),
      "data_offsets": [at, end],
    }
    at = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % _MULTIPLE)
  return len(text).to_bytes(8, "little") + text
