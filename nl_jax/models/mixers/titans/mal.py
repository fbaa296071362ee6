"""Titans, memory as layer (MAL): attention to a window of what it recalls.

    out = SWA([P | n(LMM(x))])                          (Titans sec. 4.3)

The memory stands below the attention, which therefore sees no token but
through it; n is an RMSNorm with a learned scale.
"""

import dataclasses
from typing import Annotated

from nl_jax import memory, types
from nl_jax.fields import Whole
from nl_jax.models import mixer as contract
from nl_jax.models.mixers.titans import hybrid as titans_hybrid
from nl_jax.models.mixers.titans import lmm as titans

# Deviation: the norm is ours, because what the memory's output kernel writes
# has the small scale of a residual branch, and attention reads unit scale.
_NORMS = ("lmm",)


@dataclasses.dataclass(frozen=True)
class Options(titans_hybrid.Options):
  """The switches of the memory, its persistent tokens, and this.

  Attributes:
    window: W, tokens that each token attends to, itself included.
  """

  window: Annotated[int, Whole(2)] = 1024


check = titans_hybrid.check
init_state = titans_hybrid.init_state
starts = titans_hybrid.starts
alignment = titans.alignment
levels = titans_hybrid.window_levels
flops = titans_hybrid.flops


def leaves(model: contract.Dims) -> contract.Leaves:
  """The parameters of one layer, see `titans_hybrid.leaves`."""
  return titans_hybrid.leaves(model, _NORMS)


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: titans_hybrid.HybridState | None,
  segment_ids: types.Array | None,
  *,
  model: contract.Dims,
) -> tuple[types.Array, titans_hybrid.HybridState, dict[str, memory.Metrics]]:
  """Mixes the tokens of one layer; arguments and returns as `titans.apply`."""
  near, far = (None, None) if state is None else state
  m_BxTxD, far, metrics = titans.apply(
    params["lmm"], x_BxTxD, far, segment_ids, model=model
  )
  m_BxTxD = titans_hybrid.normed(params, "lmm", m_BxTxD, model)
  y_BxTxD, near = titans_hybrid.window(
    params, m_BxTxD, near, segment_ids, model=model
  )
  return y_BxTxD, titans_hybrid.HybridState(near, far), metrics


LAYERS, WHOLE = 1, None
residual, grows = contract.around(apply), contract.bounded
