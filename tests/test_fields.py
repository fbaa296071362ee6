"""Fields: what annotations and docstrings say is what is checked."""

import dataclasses
from typing import Annotated

import pytest

from nl_jax import fields


@dataclasses.dataclass(frozen=True)
class Part:
  """A group.

  Attributes:
    depth: of it.
  """

  depth: Annotated[int, fields.Whole(1, 4)] = 2


@dataclasses.dataclass(frozen=True)
class Whole:
  """All kinds of fields.

  Attributes:
    count: how many
      there are.
    rate, other: shares.
    names: which.
  """

  count: Annotated[int, fields.Whole(2, also=(0,))]
  rate: Annotated[float, fields.DECAY] = 0.5
  other: Annotated[float, fields.POSITIVE] = 1.0
  names: Annotated[tuple[str, ...], fields.OneOf("some", "none")] = ("some",)
  fixed: Annotated[str, fields.Only("one", "use that")] = "one"
  on: bool = True
  text: str = ""
  part: Part = Part()


@dataclasses.dataclass(frozen=True)
class Derived(Whole):
  """Another default, another meaning.

  Attributes:
    rate: of this.
  """

  rate: Annotated[float, fields.DECAY] = 0.9


def test_defaults_and_remarks():
  known = fields.of(Derived)
  assert known["count"].remark == "how many there are."
  assert known["rate"].remark == "of this." and known["rate"].default == 0.9
  assert known["other"].remark == "shares."
  assert known["part"].group is Part and known["names"].many


@pytest.mark.parametrize("change", [
  dict(count=0), dict(count=2), dict(count=2**31 - 1), dict(rate=0),
  dict(rate=0.999), dict(other=1e-30), dict(names=()), dict(text="x"),
  dict(names=["none", "some"]), dict(on=False), dict(part=Part(4)),
])  # fmt: skip
def test_values_that_fit(change):
  fields.check("group", Whole, change)


@pytest.mark.parametrize("change,sentence", [
  (dict(count=1), "group.count must be a whole number from 2 to 2147483647, or "
   "0, got 1"),
  (dict(count=2**31), "got 2147483648"),
  (dict(count=True), "got True"),
  (dict(count=2.0), "got 2.0"),
  (dict(rate=1.0), "group.rate must be a number from 0 to below 1, got 1.0"),
  (dict(rate=float("nan")), "got nan"),
  (dict(rate="half"), "got 'half'"),
  (dict(other=0.0), "group.other must be a number above 0, up to 1e+18, got 0"),
  (dict(other=float("inf")), "got inf"),
  (dict(names=("some", "non")), "group.names[1] must be one of some, none; got "
   "'non'. Did you mean 'none'?"),
  (dict(names=3), "group.names must be values with commas between"),
  (dict(fixed="two"), "group.fixed must be 'one', got 'two': use that"),
  (dict(on=1), "group.on must be True or False, got 1"),
  (dict(text=None), "group.text must be text, got None"),
  (dict(part={}), "group.part must be a group of fields, got {}"),
])  # fmt: skip
def test_values_that_do_not(change, sentence):
  with pytest.raises(ValueError) as error:
    fields.check("group", Whole, change)
  assert sentence in str(error.value) and "\n" not in str(error.value)
