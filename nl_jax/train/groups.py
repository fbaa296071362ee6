"""Groups of parameters with a rate or decay of their own, or frozen.

`optim.groups` is a tuple of texts, `pattern:what`. A pattern is a regular
expression that is searched in a parameter's path, as `blocks/cms/high/w_up`;
after `!` it stands for the parameters that it is not found in. What is said is
`frozen`, or `rate=<factor>`, `decay=<number>` or both with a comma between. Of
several groups that a parameter is in, the first one counts.

    "embed:frozen"              the embeddings stay as they are
    "!blocks/cms:frozen"        only the levels learn
    "blocks/cms:rate=0.1"       a tenth of the learning rate
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from nl_jax import sharding


class Group(NamedTuple):
  """One group.

  Attributes:
    text: as it was given.
    pattern: of the paths.
    inverse: it stands for paths that the pattern is not found in.
    frozen: its parameters do not change.
    rate: factor on the learning rate.
    decay: weight decay; None: that of all.
  """

  text: str
  pattern: re.Pattern[str]
  inverse: bool
  frozen: bool = False
  rate: float = 1.0
  decay: float | None = None

  def holds(self, path: str) -> bool:
    """Whether a parameter is in it."""
    return bool(self.pattern.search(path)) != self.inverse


def parse(texts: Sequence[str]) -> tuple[Group, ...]:
  """The groups of the config field `optim.groups`.

  Raises:
    ValueError: a text that says none.
  """
  return tuple(map(_parse, texts))


def _parse(text: str) -> Group:
  pattern, colon, said = str(text).rpartition(":")
  inverse = pattern.startswith("!")
  values: dict[str, float] = {}
  words = [word.strip() for word in said.split(",")] if colon else []
  frozen = words == ["frozen"]
  try:
    if not (pattern.removeprefix("!") and words):
      raise ValueError("a pattern and what holds for it are needed")
    compiled = re.compile(pattern.removeprefix("!"))
    for word in [] if frozen else words:
      key, _, value = word.partition("=")
      if key not in ("rate", "decay") or key in values:
        raise ValueError(f"{word!r} is none of frozen, rate=, decay=")
      values[key] = float(value)
      if not 0 <= values[key] < float("inf"):
        raise ValueError(f"{word} must be at least 0 and finite")
  except (ValueError, re.error) as error:
    raise ValueError(
      f"optim.groups: {text!r} must be pattern:frozen or pattern:rate=<factor>,"
      f"decay=<number> ({error})"
    ) from error
  return Group(str(text), compiled, inverse, frozen, **values)


def label(
  groups: Sequence[Group], labels: Callable[[Any], Any]
) -> Callable[[Any], Any]:
  """Labels of levels and groups: "cms/high", or "cms/high@1" in group 1.

  Args:
    groups: of `parse`.
    labels: params -> tree of level names.
  """
  if not groups:
    return labels

  def labelled(params: Any) -> Any:
    # Trees with `optax.MaskedNode` have labels too.
    return jax.tree_util.tree_map_with_path(
      lambda path, level: _named(groups, sharding.path_name(path), level),
      labels(params),
    )

  return labelled


def _named(groups: Sequence[Group], path: str, level: str) -> str:
  for number, group in enumerate(groups):
    if group.holds(path):
      return f"{level}@{number}"
  return level


def of(groups: Sequence[Group], name: str) -> Group | None:
  """The group that a label of `label` names; None: none."""
  _, at, number = name.rpartition("@")
  return groups[int(number)] if at else None


def level_of(name: str) -> str:
  """The level that a label of `label` names."""
  return name.rpartition("@")[0] or name


def check(groups: Sequence[Group], params: Any) -> list[str]:
  """A line for each group: how many parameters it holds.

  Args:
    groups: of `parse`.
    params: a tree of arrays or shapes.

  Raises:
    ValueError: a group without a parameter of its own, or all are frozen.
  """
  held = [[0, 0] for _ in groups]
  moving = 0
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for path, x in leaves:
    name = sharding.path_name(path)
    found = [i for i, group in enumerate(groups) if group.holds(name)][:1]
    for i in found:
      held[i][0] += 1
      held[i][1] += x.size
    moving += not any(groups[i].frozen for i in found)
  for group, (count, _) in zip(groups, held):
    if not count:
      some = sharding.path_name(leaves[0][0])
      raise ValueError(
        f"optim.groups: {group.text!r} holds no parameter (of those that no "
        f"group before it holds); paths are as {some!r}, see --describe"
      )
  if not moving:
    raise ValueError("optim.groups freeze every parameter; leave one to learn")
  return [
    f"{group.text}: {count} arrays, {size:,} parameters"
    for group, (count, size) in zip(groups, held)
  ]
