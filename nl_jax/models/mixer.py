"""What a mixer is: a module of functions that satisfies `Mixer`.

A mixer sees the shape of its model as `Dims` and imports no model. Its table of
`Leaf`s is the one place where its parameters are declared. To add one: a module
in `mixers/`, a line in `mixers/registry.py`, a shape for each size in
`presets`, a row in `tests/laws/models.py`.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from nl_jax import types
from nl_jax.levels import LevelRow
from nl_jax.models import cms, layers
from nl_jax.models import leaves as leaves_lib
from nl_jax.models.flops import Flops
from nl_jax.models.leaves import Leaf as Leaf
from nl_jax.models.leaves import Leaves as Leaves

Result = tuple[Any, Any, dict[str, Any]]  # Stream or output, state, metrics.


@dataclasses.dataclass(frozen=True)
class Dims:
  """The shape of a model, as its mixer sees it.

  Attributes:
    arch: a key of `lm.MIXERS`; modules of several tell them apart by it.
    width, layers, heads, head_dim: D, L, H and K.
    sequence_length: slots of an unbounded cache by default.
    cms: the feed-forward part.
    mixer: the module's `Options`.
    dtype: of activations.
    at_edge: see `lm.LanguageModel`.
    norm_epsilon: of the norms of blocks, levels and output.
  """

  arch: str
  width: int
  layers: int
  heads: int
  head_dim: int
  sequence_length: int
  cms: cms.Options
  mixer: Any
  dtype: str
  at_edge: bool
  norm_epsilon: float


class Whole(NamedTuple):
  """What more a module has that is all of a layer, feed-forward part included.

  Attributes:
    enter: the residual stream -> what goes up the layers.
    leave: what goes up the layers -> the residual stream.
    laid: parameters of the mixers -> the same with leaves [L,...] all.
  """

  enter: Callable[[types.Array], Any]
  leave: Callable[[Any], types.Array]
  laid: Callable[[types.Params], types.Params]


class Mixer(Protocol):
  """The names that a module of a mixer has; `model` is always the shape.

  Attributes:
    Options: the switches, a frozen dataclass: the config group `model.mixer`.
    LAYERS: how many layers one of its units holds.
  """

  Options: Any
  LAYERS: int

  @property
  def WHOLE(self) -> Whole | None:
    """What it has besides where it is all of a layer."""

  def check(self, model: Dims) -> None:
    """Raises ValueError for a shape that the mixer does not take."""

  def leaves(self, model: Dims) -> Leaves:
    """The parameters of one layer."""
    ...

  def residual(
    self,
    params: types.Params,
    x_BxTxD: Any,
    state: Any,
    segment_ids: types.Array | None,
    *,
    model: Dims,
  ) -> Result:
    """The residual stream after the mixer, the state, sums for metrics.

    Most are `around(apply)`. `params` are the mixer_norm and mixer of a layer.
    """
    ...

  def init_state(
    self, params: types.Params, batch_size: int, length: int, *, model: Dims
  ) -> Any:
    """The state of one layer at the start of a sequence."""

  def starts(
    self, params: types.Params, model: Dims
  ) -> Mapping[str, types.Params]:
    """What each memory learns from, by its place in the state."""
    ...

  def alignment(self, model: Dims) -> int:
    """Documents of a packed row must begin at multiples of this."""
    ...

  def grows(self, model: Dims) -> bool:
    """Whether the state has an unbounded cache, of `length` slots."""
    ...

  def levels(self, model: Dims) -> list[LevelRow]:
    """Its rows of the level card."""
    ...

  def flops(self, model: Dims, tokens: int) -> Flops:
    """FLOPs of a token in the forward pass of one unit (see `flops`)."""
    ...


def around(apply: Callable[..., Result]) -> Callable[..., Result]:
  """x + Mixer(RMSNorm(x)), the `residual` of a mixer that is `apply`."""

  def residual(
    params: types.Params,
    x_BxTxD: types.Array,
    state: Any,
    segment_ids: types.Array | None,
    *,
    model: Dims,
  ) -> Result:
    scale = params["mixer_norm"]["scale"]
    normed = layers.rms_norm(x_BxTxD, scale, model.norm_epsilon)
    y_BxTxD, state, metrics = apply(
      params["mixer"], normed, state, segment_ids, model=model
    )
    return x_BxTxD + y_BxTxD, state, metrics

  return residual


def anywhere(model: Dims) -> int:
  """The `alignment` 1: documents may begin at any token."""
  del model
  return 1


def bounded(model: Dims) -> bool:
  """The `grows` of a state that has one size."""
  del model
  return False


def empty(params: types.Params, model: Dims) -> dict[str, types.Params]:
  """The `starts` of memories that begin empty."""
  del params, model
  return {}


def check_heads(model: Dims, *, even: bool = False) -> None:
  """Raises ValueError unless the heads fill the width; `even`: for RoPE."""
  if model.heads * model.head_dim != model.width:
    raise ValueError(
      "model.heads * model.head_dim must be model.width, got "
      f"{model.heads} * {model.head_dim} != {model.width}"
    )
  if even:
    check_even(model)


def check_even(model: Dims) -> None:
  """Raises ValueError unless RoPE can turn the features of a head in pairs."""
  if model.head_dim % 2:
    raise ValueError(
      f"model.head_dim must be even for RoPE, got {model.head_dim}"
    )


def state_bytes(
  table: Leaves, init_state: Callable[..., Any], model: Dims
) -> int:
  """Bytes that the mixers of all layers carry for one sequence.

  Args:
    table: of the mixer.
    init_state: of the mixer; a cache that grows has no slots.
    model: shapes and switches.
  """
  start = lambda params: init_state(params, 1, 0, model=model)
  state = jax.eval_shape(start, leaves_lib.shapes(table))
  sizes = (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  return model.layers * sum(sizes)


def filled(made: type, values: Mapping[str, Any], missing: str) -> Any:
  """A dataclass from values by name; groups are filled by their default's."""
  known = {field.name: field for field in dataclasses.fields(made)}
  for name in values:
    if name not in known:
      close = difflib.get_close_matches(name, known, n=1)
      hint = f" Did you mean {close[0]!r}?" if close else ""
      raise ValueError(f"{missing}{name}; it has {', '.join(known)}.{hint}")
  return made(
    **{
      name: filled(type(known[name].default), value, f"{missing}{name}.")
      if isinstance(value, Mapping)
      else value
      for name, value in values.items()
    }
  )
