"""Shapes that names promise, checked as tests call: the legend of nl_jax.types.

`x_BxTxD` has three axes, and B is one number in all arguments of a call: those
whose names end in axes are checked, and those of `SHAPES`, whose names do not.
"""

import functools
import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest

_AXES = re.compile(r"_((?:[A-Z0-9]x)*[A-Z0-9])$")
# Functions whose arguments have plain names; "..." are any axes before.
SHAPES = {
  "nl_jax.kernels.rank_one.api.rank_one": dict(
    U="...Ca", Delta="...Cb", Q="...Ca", W="...ab", S="...ab", R="...ab",
    returns=("...Cb", "...ab", "...ab"),
  ),
  "nl_jax.memory.chunked.update": dict(
    q="BTHK", k="BTHK", v="BTHV", segment_ids="BT", returns=("BTHV",),
  ),
  "nl_jax.memory.linear.update": dict(
    q="BTHK", k="BTHK", v="BTHV", segment_ids="BT", returns=("BTHV",),
  ),
  "nl_jax.memory.mlp.update": dict(
    q="BTHK", k="BTHK", v="BTHV", segment_ids="BT", returns=("BTHV",),
  ),
  "nl_jax.models.cms.apply": dict(returns=("BTD",)),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def shapes() -> Iterator[None]:
  """Wraps the functions of all kernels, memories and models, for a module."""
  kept = []
  for package in ("nl_jax.kernels", "nl_jax.memory", "nl_jax.models"):
    root = importlib.import_module(package)
    for found in pkgutil.walk_packages(root.__path__, f"{package}."):
      module = importlib.import_module(found.name)
      for name, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType):
          kept.append((module, name, value))
          setattr(module, name, checked(value))
  yield
  for module, name, value in kept:
    setattr(module, name, value)


def checked(function: types.FunctionType) -> types.FunctionType:
  """A function that raises AssertionError for a shape that is not promised."""
  where = f"{function.__module__}.{function.__qualname__}"
  shapes = SHAPES.get(where, {})
  signature = inspect.signature(function)
  if not shapes and not any(map(_AXES.search, signature.parameters)):
    return function

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    sizes: dict[str, int] = {}
    bound = signature.bind(*args, **kwargs).arguments
    for name, value in bound.items():
      named(where, name, value, shapes.get(name), sizes)
    out = function(*args, **kwargs)
    for i, axes in enumerate(shapes.get("returns", ())):
      value = out[i] if isinstance(out, tuple) else out
      named(where, f"result {i}", value, axes, sizes)
    return out

  return call


def named(
  where: str, name: str, value: Any, axes: str | None, sizes: dict[str, int]
) -> None:
  """Checks one value, by its name unless `axes` says what it has."""
  match = _AXES.search(name)
  if axes is None and match:
    axes = match[1].replace("x", "")
  shape = getattr(value, "shape", None)
  if axes is None or not isinstance(shape, tuple):
    return
  wanted, free = axes.removeprefix("..."), axes.startswith("...")
  told = f"{where}: {name} of shape {shape} is not [{axes}] with {sizes}"
  assert len(shape) >= len(wanted) if free else len(shape) == len(wanted), told
  for axis, size in zip(wanted, shape[len(shape) - len(wanted) :]):
    expected = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
    assert size == expected, told
