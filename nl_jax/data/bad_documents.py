"""Documents that cannot be used: what is said of them, and who takes them."""

from collections.abc import Callable, Iterator
from typing import Any

POLICIES = ("refuse", "skip")
_PLACES = 3  # Of bad documents that are reported.


class BadDocumentError(ValueError):
  """A document that cannot be used, in a file that can."""


OnBad = Callable[[BadDocumentError], None]  # Takes a bad document.
# Names of documents, and what gives the text of each or raises what is bad.
Found = Iterator[tuple[str, Callable[[], str]]]


class Skipped:
  """Takes bad documents that are left out; `refuse` takes none.

  Attributes:
    count: how many.
    places: the sentences of the first three.
  """

  def __init__(self):
    self.count, self.places = 0, []

  def __call__(self, error: BadDocumentError) -> None:
    """Takes one."""
    self.count += 1
    if len(self.places) < _PLACES:
      self.places.append(str(error))


def refuse(error: BadDocumentError) -> None:
  """Raises it."""
  raise error


def on_bad(policy: str) -> OnBad:
  """What takes bad documents, for the field data.bad_documents.

  Raises:
    ValueError: no such policy.
  """
  if policy not in POLICIES:
    raise ValueError(
      f"data.bad_documents must be one of {', '.join(POLICIES)}; got {policy!r}"
    )
  return Skipped() if policy == "skip" else refuse


def string(value: Any, key: str, where: Callable[[], str]) -> str:
  """A value as the text of a document.

  Raises:
    BadDocumentError: it is something else, or has half a character; the
      sentence begins with where().
  """
  if not isinstance(value, str):
    found = "null" if value is None else type(value).__name__
    raise BadDocumentError(
      f"{where()}: {key!r} is {found}, expected text; set "
      "data.text_key to the field with the text"
    )
  try:
    if not value.isascii():
      value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise BadDocumentError(
      f"{where()}: {key!r} has half a character, "
      f"{value[error.start]!r}; fix the line or leave it out"
    ) from None
  return value
