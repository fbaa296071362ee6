"""Records that are a `tf.train.Example`, as TensorFlow Datasets writes them.

    Example   1: Features
    Features  1: entry of a map, many times
    entry     1: name, 2: Feature
    Feature   1: list of bytes, 2: list of floats, 3: list of integers
    list      1: value, many times

Numbers are those of fields in the protocol buffer; each of these fields is a
length and so many bytes. Nothing of TensorFlow is needed to read them.
"""

from collections.abc import Iterator
from typing import NamedTuple

_BYTES = 1
_KINDS = {_BYTES: "bytes", 2: "floats", 3: "integers"}
_LENGTH_DELIMITED = 2


class Feature(NamedTuple):
  """One feature.

  Attributes:
    kind: "bytes", "floats", "integers" or "nothing".
    values: of bytes; () of the others.
  """

  kind: str
  values: tuple[bytes, ...]


class _NoneError(Exception):
  """These bytes are something else."""


def features(record: bytes) -> dict[str, Feature] | None:
  """The features of an Example by name; None for any other record.

  Text is none: each byte must have its place in the structure above, which
  begins with a line break and continues with lengths that fit to the last byte.
  """
  found = {}
  try:
    if not record:
      return None
    for _, body in _fields(record, {1}):
      for _, entry in _fields(body, {1}):
        pair = dict(_fields(entry, {1, 2}))
        found[pair[1].decode("utf-8")] = _feature(pair.get(2, b""))
  except (_NoneError, KeyError, UnicodeDecodeError):
    return None
  return found


def _feature(content: bytes) -> Feature:
  for number, body in _fields(content, set(_KINDS)):
    values: tuple[bytes, ...] = ()
    if number == _BYTES:
      values = tuple(value for _, value in _fields(body, {1}))
    return Feature(_KINDS[number], values)
  return Feature("nothing", ())


def _fields(content: bytes, known: set[int]) -> Iterator[tuple[int, bytes]]:
  """(number, bytes) of each field, all of which have a length."""
  at = 0
  while at < len(content):
    number, kind = content[at] >> 3, content[at] & 7
    if kind != _LENGTH_DELIMITED or number not in known:
      raise _NoneError
    size, at = _varint(content, at + 1)
    if at + size > len(content):
      raise _NoneError
    yield number, content[at : at + size]
    at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
  """A number of seven bits a byte, and the place after it."""
  value = 0
  for shift in range(0, 64, 7):
    if at >= len(content):
      raise _NoneError
    byte, at = content[at], at + 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      return value, at
  raise _NoneError
