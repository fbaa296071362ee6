"""Titans, memory as gate (MAG): attention to a window, gated by the memory.

    out = n1(SWA([P | x])) * sigmoid(n2(LMM(x)))        (Titans sec. 4.2)

Both branches read the same input; the window is the short-term memory, exact,
and the other one fades. The non-linearity of the product is not certain:
`mag_gate` (docs/mathematics.md 6).
"""

import dataclasses
from typing import Annotated

from nl_jax import memory, types
from nl_jax.fields import Whole
from nl_jax.models import mixer as contract
from nl_jax.models.mixers.titans import hybrid as titans_hybrid
from nl_jax.models.mixers.titans import lmm as titans

_NORMS = ("attention", "lmm")


@dataclasses.dataclass(frozen=True)
class Options(titans_hybrid.Options):
  """The switches of the memory, its persistent tokens, and these.

  Attributes:
    window: W, tokens that each token attends to, itself included.
    mag_gate: what the memory's normalised output goes through: "sigmoid",
      "silu" or "linear" (as it is); ours, unstated.
  """

  window: Annotated[int, Whole(2)] = 1024
  mag_gate: titans_hybrid.Gate = "sigmoid"


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
  y_BxTxD, near = titans_hybrid.window(
    params, x_BxTxD, near, segment_ids, model=model
  )
  m_BxTxD, far, metrics = titans.apply(
    params["lmm"], x_BxTxD, far, segment_ids, model=model
  )
  gate = titans_hybrid.GATES[model.mixer.mag_gate]
  m_BxTxD = gate(titans_hybrid.normed(params, "lmm", m_BxTxD, model))
  y_BxTxD = titans_hybrid.normed(params, "attention", y_BxTxD, model)
  return y_BxTxD * m_BxTxD, titans_hybrid.HybridState(near, far), metrics


LAYERS, WHOLE = 1, None
residual, grows = contract.around(apply), contract.bounded
