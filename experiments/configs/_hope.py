"""Builders of the HOPE configs: self-modifying Titans and a CMS (eq. 94-97).

`mlp` has the paper's memories, two-layer MLPs; `linear` matrices, the cheap
form. Switches and defaults: docs/mathematics.md 3.3 and 9. `mlp` takes the
argument `paper`: every switch at its literal reading.
"""

from typing import Any

from experiments.configs import _common
from nl_jax.models import presets

ConfigDict = _common.ConfigDict


def mlp(size: str, arg: str, **cms: Any) -> ConfigDict:
  """HOPE with MLP memories; `paper` in arg: the literal reading.

  Args:
    size: a key of `_common.SCALES`.
    arg: of the config.
    cms: what differs in the group `cms`.
  """
  size = _common.size_of(size, arg, options=("paper",))
  if "paper" not in arg.split(","):
    return _hope("hope", size, {}, cms)
  literal = dict(
    dgd_scope="input_layer",  # The only shape-literal reading of eq. 88.
    dgd_coef="raw",  # Eq. 88: eta itself.
    erase_of="whole",  # Eq. 88: the erase acts on the whole weight.
    read="chunk_start",  # Eq. 90.
    value_source="self",  # Eq. 84, of M_memory too.
    value_norm="target",  # A stabiliser: NaN without (docs/mathematics.md 9).
    # eta starts at 0.05, unstated in the paper: from 0.5 the raw erase of the
    # input layer alone is NaN at the third step of the tiny model.
    eta_bias=-3.0,
    generators=dict(rate=1.0),  # They learn as fast as M_memory.
  )
  return _hope("hope_paper", size, literal, cms)


def linear(size: str, arg: str) -> ConfigDict:
  """HOPE with matrix memories."""
  matrix = dict(
    memory="linear",  # A matrix K x K.
    residual=False,  # M_memory: read is q W (docs/mathematics.md 9).
    objective="dot",  # With raw erase: the delta rule (docs/mathematics.md 9).
    dgd_coef="raw",  # Eq. 88: eta itself.
    residual_clip=0.0,  # The delta rule is bounded without.
  )
  return _hope("hope_linear", _common.size_of(size, arg), matrix, {})


def _hope(
  name: str, size: str, mixer: dict[str, Any], cms: dict[str, Any]
) -> ConfigDict:
  shape = presets.SHAPES[name][size]
  chunks = dict(chunk_memory=shape.chunk, chunk_gen=shape.chunk)
  model = dict(
    arch="hope",
    heads=shape.heads,
    head_dim=shape.head_dim,
    mixer=dict(hidden=shape.hidden) | chunks | mixer,
    cms=_common.three_levels(size, shape) | cms,
  )
  return _common.language_model(size, model)
