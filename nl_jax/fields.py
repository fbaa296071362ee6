"""The fields of a config: what each may be, and what it means.

A field is a parameter of a dataclass or of a function. Its annotation says what
it may be, `Annotated[int, Whole(1)]`; its default stands beside it; the
docstring's "Attributes" or "Args" say what it means. Configs, checks and
docs/config.md are made from these, so that nothing is said twice.
"""

import dataclasses
import difflib
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

LARGEST = 2**31 - 1  # Of what is counted in int32.
_ENTRY = re.compile(r"^  (\w[\w, ]*): (.*)$")
_SECTIONS = ("Attributes:", "Args:")


class Whole(NamedTuple):
  """A whole number in [least, most], or one of `also`."""

  least: int = 0
  most: int = LARGEST
  also: tuple[int, ...] = ()

  def __str__(self) -> str:
    also = "".join(f", or {x}" for x in self.also)
    return f"a whole number from {self.least} to {self.most}{also}"

  def takes(self, value: Any) -> bool:
    """Whether a value is one."""
    if type(value) is not int:
      return False
    return self.least <= value <= self.most or value in self.also


class Number(NamedTuple):
  """A finite number in [least, most], without an end that is open.

  The bounds are wide: what float32 holds with room for squares.
  """

  least: float = -1e18
  most: float = 1e18
  above: bool = False
  below: bool = False

  def __str__(self) -> str:
    begin = (
      f"above {self.least:g}, up to"
      if self.above
      else (f"from {self.least:g} to")
    )
    return f"a number {begin} {'below ' * self.below}{self.most:g}"

  def takes(self, value: Any) -> bool:
    """Whether a value is one; NaN is not."""
    if type(value) not in (int, float):
      return False
    high = value < self.most if self.below else value <= self.most
    low = value > self.least if self.above else value >= self.least
    return low and high


class OneOf(tuple[str, ...]):
  """Names, one of which a value must be.

  Attributes:
    otherwise: why another does not fit; "" where the names say it.
  """

  otherwise: str

  def __new__(cls, *names: str, otherwise: str = "") -> "OneOf":
    """Of the names given."""
    made = super().__new__(cls, names)
    made.otherwise = otherwise
    return made

  def __str__(self) -> str:
    return f"one of {', '.join(self)}"

  def takes(self, value: Any) -> bool:
    """Whether a value is one of them."""
    return isinstance(value, str) and value in self


class Only(NamedTuple):
  """The one value that fits, and what to do for another."""

  value: Any
  otherwise: str

  def __str__(self) -> str:
    return repr(self.value)

  def takes(self, value: Any) -> bool:
    """Whether a value is that one."""
    return type(value) is type(self.value) and value == self.value


POSITIVE = Number(0.0, above=True)
AT_LEAST_0 = Number(0.0)
SHARE = Number(0.0, 1.0)
DECAY = Number(0.0, 1.0, below=True)
LOGIT = Number(-100.0, 100.0)  # A sigmoid of these is 0 or 1 in float32.
SEED = Whole(0, 2**32 - 1)  # Random keys forget what is beyond.


class _Plain(NamedTuple):
  """A type without bounds."""

  kind: type
  said: str

  def __str__(self) -> str:
    return self.said

  def takes(self, value: Any) -> bool:
    return type(value) is self.kind


TEXT = _Plain(str, "text")
_PLAIN = {bool: _Plain(bool, "True or False"), str: TEXT}


class Field(NamedTuple):
  """A field of a dataclass or function.

  Attributes:
    name: of the parameter.
    default: `inspect.Parameter.empty` where it must be given.
    bounds: of its value, or of each entry where `many`; None where nothing is
      said of them (groups, objects).
    many: it is a tuple of values.
    group: the dataclass of a field that is a group itself, or None.
    remark: what the docstring says of it.
  """

  name: str
  default: Any
  bounds: Any
  many: bool
  group: type | None
  remark: str

  @property
  def said(self) -> str:
    """What it may be, in words."""
    return f"{self.bounds}, each" if self.many else str(self.bounds)

  @property
  def words(self) -> bool:
    """Whether it is of text."""
    return self.bounds is TEXT or isinstance(self.bounds, OneOf)


@functools.cache
def of(made: Callable[..., Any]) -> dict[str, Field]:
  """The fields of a dataclass or a function, by name, in order."""
  remarks = _remarks(made)
  hints = typing.get_type_hints(made, include_extras=True)
  found = {}
  for name, parameter in inspect.signature(made).parameters.items():
    kind, bounds = hints.get(name, Any), None
    if typing.get_origin(kind) is typing.Annotated:
      kind, bounds = typing.get_args(kind)[:2]
    many = typing.get_origin(kind) is tuple
    is_group = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    group = kind if is_group else None
    if bounds is None:
      bounds = _PLAIN.get(typing.get_args(kind)[0] if many else kind)
    found[name] = Field(
      name, parameter.default, bounds, many, group, remarks.get(name, "")
    )
  return found


def check(
  group: str, made: Callable[..., Any], values: Mapping[str, Any]
) -> None:
  """Raises ValueError for the first value that its field does not take.

  Args:
    group: of the config, as "model.mixer"; messages name the whole path.
    made: the dataclass or function whose parameters the values are.
    values: by name; what has no bounds, or is not a parameter, is passed over.
  """
  known = of(made)
  for name, value in values.items():
    if name in known:
      check_value(f"{group}.{name}", known[name], value)


def check_value(path: str, field: Field, value: Any) -> None:
  """Raises ValueError, which names the path, unless a field takes a value."""
  bounds = field.bounds
  if field.group and not isinstance(value, field.group):
    raise ValueError(f"{path} must be a group of fields, got {value!r}")
  if bounds is None:
    return
  if not field.many:
    _check_one(path, bounds, value)
    return
  if not isinstance(value, (tuple, list)):
    raise ValueError(
      f"{path} must be values with commas between, each {bounds}; got {value!r}"
    )
  for i, entry in enumerate(value):
    _check_one(f"{path}[{i}]", bounds, entry)


def _check_one(path: str, bounds: Any, value: Any) -> None:
  if bounds.takes(value):
    return
  names = bounds if isinstance(bounds, OneOf) else ()
  close = difflib.get_close_matches(str(value), names, n=1)
  hint = f". Did you mean {close[0]!r}?" if close else ""
  if otherwise := getattr(bounds, "otherwise", ""):
    hint = f": {otherwise}"
  mark = ";" if names else ","
  raise ValueError(f"{path} must be {bounds}{mark} got {value!r}{hint}")


def near(name: str, known: Iterable[str]) -> str:
  """The question whether one of the known was meant; "" where none is near."""
  close = difflib.get_close_matches(name, list(known))
  return f"Did you mean {' or '.join(close)}? " if close else ""


def _remarks(made: Callable[..., Any]) -> dict[str, str]:
  """What docstrings say of fields, by name; a class has more say than bases."""
  found: dict[str, str] = {}
  for part in reversed(
    inspect.getmro(made) if inspect.isclass(made) else [made]
  ):
    names: list[str] = []
    lines = inspect.cleandoc(part.__doc__ or "").splitlines()
    starts = [i for i, line in enumerate(lines) if line in _SECTIONS]
    for line in lines[starts[0] + 1 :] if starts else ():
      entry = _ENTRY.match(line)
      if entry:
        names = entry[1].split(", ")
        found |= dict.fromkeys(names, entry[2])
      elif line.startswith("    "):
        for name in names:
          found[name] += f" {line.strip()}"
      elif line:
        break
  return found
