"""The sentences of this room's errors: what was given, expected, to do."""

import difflib
from collections.abc import Iterable
from typing import Any


def unknown_name(key: str, given: str, known: Iterable[str]) -> ValueError:
  """The error for a name that is not in a table, with the closest names."""
  known = list(known)
  close = difflib.get_close_matches(given, known)
  hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
  return ValueError(f"no {key} {given!r}. {hint}Known: {', '.join(known)}")


def require_positive(**values: int) -> None:
  """Raises ValueError naming the first value that is not an int >= 1."""
  for key, value in values.items():
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(
        f"data.{key} must be a whole number of at least 1, got {value!r}"
      )


def require_multiple(
  key: str, value: int, divisor_key: str, divisor: int
) -> None:
  """Raises ValueError unless divisor divides value, with the nearest values."""
  if value % divisor:
    below = value // divisor * divisor
    nearest = " or ".join(str(x) for x in (below, below + divisor) if x)
    raise ValueError(
      f"{key} must be a multiple of {divisor_key}, got {key}={value} and "
      f"{divisor_key}={divisor}; nearest: {nearest}"
    )


def misfit(value: Any, shape: Any, where: str = "its top") -> str:
  """The first place of a JSON value that is not as it must be; "" for none.

  Args:
    value: as it was read.
    shape: a type; a dict of shapes by key, others may be there; or a list of
      one shape, that of its entries. An int must be 0 or more.
    where: the place of the value.
  """
  if isinstance(shape, type):
    fits = type(value) is shape and not (isinstance(value, int) and value < 0)
    return "" if fits else where
  if type(value) is not type(shape):
    return where
  if isinstance(shape, list):
    parts = [(f"{where}[{i}]", x, shape[0]) for i, x in enumerate(value)]
  else:
    parts = [(f"{where}.{k}", value.get(k), s) for k, s in shape.items()]
  found = (misfit(x, s, place) for place, x, s in parts)
  return next(filter(None, found), "").removeprefix("its top.")
