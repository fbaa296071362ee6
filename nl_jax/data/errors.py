"""The sentences of this room's errors: what was given, expected, to do."""

import difflib
from collections.abc import Iterable


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
