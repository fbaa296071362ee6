"""Folders of safetensors files, read tensor by tensor.

A model's weights are in `model.safetensors`, or in several files that
`model.safetensors.index.json` names. Nothing is read before it is asked for,
so that a model takes no more memory than the arrays made of it.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nl_jax import files as whole
from nl_jax import tensors

MODEL = "model.safetensors"
_INDEX = f"{MODEL}.index.json"
_READ = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file; `np.asarray` reads it.

  Attributes:
    file: of safetensors.
    name: in the file.
    shape: of the tensor.
    dtype: name of the stored dtype.
    seals: of the file's tensors, where it has any (nl_jax.tensors).
  """

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: str
  seals: Mapping[str, str] | None = None

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    """The numbers, in float32 by default: exact from every stored dtype."""
    del copy  # What is read is always new.
    import safetensors

    with safetensors.safe_open(str(self.file), "numpy") as file:
      found = file.get_tensor(self.name)
    tensors.check(self.file, self.name, found, self.seals)
    return found.astype(dtype or np.float32)


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """The object of a JSON file.

  Raises:
    ValueError: it holds none.
  """
  value = whole.read_json(path)
  if not isinstance(value, dict):
    raise ValueError(f"{path} must hold a JSON object, got {value!r:.60}")
  return value


def open_folder(folder: pathlib.Path) -> dict[str, Stored]:
  """All tensors of a folder, by name; their numbers are not read.

  Raises:
    ValueError: no weights there, a torn file, one that is missing, or numbers
      of another dtype than float32, bfloat16 and float16.
  """
  found: dict[str, Any] = {}
  for path in _paths(folder):
    for stored in _entries(path):
      if stored.name in found:
        raise ValueError(
          f"{path} and {found[stored.name].file} both hold {stored.name}; keep "
          "the files of one model in a folder"
        )
      found[stored.name] = stored
  return found


def _paths(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of the model in a folder."""
  if (folder / MODEL).is_file():
    return [folder / MODEL]
  if not (folder / _INDEX).is_file():
    raise ValueError(
      f"{folder} has no {MODEL} and no {_INDEX}; give a folder with the "
      "weights of a model as safetensors"
    )
  names = read_object(folder / _INDEX).get("weight_map")
  if not isinstance(names, dict) or not names:
    raise ValueError(f"{folder / _INDEX} has no weight_map of names to files")
  paths = [folder / name for name in sorted(set(map(str, names.values())))]
  missing = [path.name for path in paths if not path.is_file()]
  if missing:
    raise ValueError(
      f"{folder} lacks {', '.join(missing)} of its {_INDEX}; fetch the model "
      "again"
    )
  return paths


def _entries(path: pathlib.Path) -> list[Stored]:
  """What a file says that it holds."""
  import safetensors

  entries = []
  try:
    with safetensors.safe_open(str(path), "numpy") as file:
      seals = tensors.seals_of(tensors.open_texts(path, file.metadata()))
      for name in file.keys():
        part = file.get_slice(name)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        stored = _READ.get(dtype, dtype)
        entries.append(Stored(path, name, shape, stored, seals))
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} is not a safetensors file, or a torn one ({error}); fetch "
      "it again"
    ) from error
  for stored in entries:
    if stored.dtype not in _READ.values():
      raise ValueError(
        f"{path} holds {stored.name} as {stored.dtype}; weights must be "
        f"{', '.join(_READ.values())}: quantized models are not read"
      )
  return entries
