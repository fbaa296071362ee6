"""What the parts of `incontext` see of the model that they are parts of."""

from typing import Any, Protocol

from nl_jax import levels as runner
from nl_jax import types
from nl_jax.models import lm


class Learner(Protocol):
  """Of `model.InContextModel`, the shape and the levels.

  Attributes:
    base: the model whose levels learn in context.
    inner: the same inside the levels' loops.
    options: how they learn, `model.Options`.
    at_edge: whether rows and documents begin with micro-chunks.
    fast_levels: names of the levels that learn, fastest first.
    fast_layers: how many of the last layers have them.
  """

  @property
  def base(self) -> lm.LanguageModel: ...

  @property
  def inner(self) -> lm.LanguageModel: ...

  @property
  def options(self) -> Any: ...

  @property
  def at_edge(self) -> bool: ...

  @property
  def fast_levels(self) -> tuple[str, ...]: ...

  @property
  def fast_layers(self) -> int: ...

  def split(self, stacked: Any) -> tuple[Any, Any]:
    """The layers without fast levels, and those with."""
    ...

  def split_mixers(self, states: Any) -> tuple[Any, Any]:
    """The mixers that no fast weight is before, and the others."""
    ...

  def theta(self, params: types.Params) -> dict[str, types.Params]:
    """The start of the fast weights by level, leaves [fast layers,...]."""
    ...

  def rules(self, params: types.Params) -> list[runner.Level]:
    """The fast levels, fastest first; a unit is a micro-chunk."""
    ...
