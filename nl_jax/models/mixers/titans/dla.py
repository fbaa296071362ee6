"""Deep linear attention (DLA): a deep memory that learns by plain products.

    M <- alpha M + (1 - alpha) M_0 + eta grad <M(k), v>

Atlas, arXiv 2505.23735. It is the layer of Titans (`titans`) with the inner
objective `dot` and without momentum; with a matrix for M it would be gated
linear attention. The feature map on keys and queries is the unit norm.
"""

import dataclasses
from typing import Annotated

from nl_jax import fields
from nl_jax.fields import Only
from nl_jax.levels import LevelRow
from nl_jax.memory import rule
from nl_jax.models import mixer as contract
from nl_jax.models.mixers.titans import lmm as titans


@dataclasses.dataclass(frozen=True)
class Options(titans.Options):
  """The switches of `titans.Options`, but for what makes it DLA."""

  objective: Annotated[str, Only("dot", titans.LMM)] = "dot"
  momentum: Annotated[str, Only("off", titans.LMM)] = "off"
  # Deviation from Atlas (zero): two layers that learn by their product and
  # decay to 0 stay there, since neither then has a gradient.
  retention_target: rule.Retention = "init"
  # No error pulls the product back: on repeated tokens it grows unless
  # eta |error| < 1 - alpha, which at the start is .01 < .018.
  eta_max: Annotated[float, fields.POSITIVE] = 0.02


check = titans.check
leaves = titans.leaves
apply = titans.apply
init_state = titans.init_state
starts = titans.starts
alignment = titans.alignment
flops = titans.flops
residual, grows = titans.residual, titans.grows
LAYERS, WHOLE = 1, None


def levels(model: contract.Dims) -> list[LevelRow]:
  """The memory; its start is learned."""
  return [
    dataclasses.replace(row, name="DLA memory") for row in titans.levels(model)
  ]
