"""What the scripts of this folder share: other projects' code, and files.

A script runs once, where its packages are installed, and writes the npz of its
name: inputs, values and gradients by name, and the versions that made them.
Their numbers are frozen; if a change of the definition is intended, say in the
commit which code base defines the new one, and run the script again.
"""

import importlib.metadata
import importlib.util
import pathlib

import numpy as np


def module_at(package: str, file: str):
  """A single file of an installed package, without importing the package.

  flash-linear-attention imports its GPU kernels; its naive files need none.
  """
  folder = importlib.util.find_spec(package).submodule_search_locations[0]
  spec = importlib.util.spec_from_file_location(
    pathlib.Path(file).stem, pathlib.Path(folder) / file
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def save(script: str, arrays: dict[str, np.ndarray], packages: list[str]):
  """Writes `arrays` and the packages' versions beside the script."""
  versions = [f"{p} {importlib.metadata.version(p)}" for p in packages]
  path = pathlib.Path(script).with_suffix(".npz")
  np.savez_compressed(path, versions=np.array(versions), **arrays)


def load(name: str) -> dict[str, np.ndarray]:
  """The arrays of `<name>.npz`."""
  with np.load(pathlib.Path(__file__).parent / f"{name}.npz") as file:
    return {key: file[key] for key in file.files}
