"""The algebra of a chunk, which all memories share (docs/architecture.md 3)."""

import jax

from nl_jax.kernels.rank_one import reference, xla
from nl_jax.kernels.rank_one.rates import SHARED
from nl_jax.kernels.rank_one.rates import Rates as Rates

READS = ("after", "before", "chunk_start")
ERASES = ("deviation", "whole")
IMPLEMENTATIONS = ("reference", "xla")


def rank_one(
  U: jax.Array,
  Delta: jax.Array,
  Q: jax.Array | None,
  rates: Rates,
  W: jax.Array,
  S: jax.Array | None,
  R: jax.Array | None,
  *,
  read: str,
  erase_of: str,
  anchor: jax.Array | None = None,
  start: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  window: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
  """Writes a chunk into a matrix, and reads it (docs/mathematics.md 2.3, 2.5).

  Leading axes are any, the same for all; size 1 broadcasts.

  Args:
    U: [..., C, a], the layer's inputs; Delta: [..., C, b], its errors, both
      taken at the anchor.
    Q: [..., C, a], what to read with, or None: only write.
    rates: see `Rates`; the reference also takes gates of a channel,
      [..., C, a, 1] or [..., C, 1, b].
    W: [..., a, b] at the start of the call; S: its momentum, or None.
    R: [..., a, b], what retention decays to; None is 0.
    read: "after" (own write included), "before", or "chunk_start".
    erase_of: "deviation" erases from W - R, "whole" from W.
    anchor: the state that `chunk_start` reads see; default W.
    start: [..., a, b], the state in which a new document begins.
    segment_ids: int32 [..., C], 0 is padding; the first document is the one
      that W, S and anchor belong to. Needs `start`.
    window: (U, Delta, weights), h more tokens before the chunk, [..., h, ·],
      and [..., C, h + C]: token t writes sum_i weights_ti u_i^T delta_i in
      place of u_t^T delta_t. No weight but 0 for i > t, across documents and
      of masked tokens.
    implementation: "reference" (token loop), "xla" (chunk form), None = "xla".

  Returns:
    (reads [..., C, b] or None, W, S), the states after the last token.

  Raises:
    ValueError: an unknown switch, or rates that the form does not take.
  """
  check(rates, S, read=read, erase_of=erase_of)
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"implementation of rank_one must be one of {IMPLEMENTATIONS}, got "
      f"{implementation!r}"
    )
  if segment_ids is not None and start is None:
    raise ValueError("segment_ids needs start: the state of a new document")
  form = reference if implementation == "reference" else xla
  if form is xla and rates.log_alpha.ndim > U.ndim:
    raise ValueError(
      "gates of one value a channel run only with "
      f"implementation='reference', got gates of rank {rates.log_alpha.ndim} "
      f"for inputs of rank {U.ndim}"
    )
  return form.rank_one(
    U, Delta, Q, rates, W, S, R,
    read=read, erase_of=erase_of, anchor=anchor, start=start,
    segment_ids=segment_ids, window=window,
  )  # fmt: skip


def check(
  rates: Rates, S: jax.Array | None, *, read: str, erase_of: str
) -> None:
  """Raises ValueError for switches and rates that do not fit."""
  if read not in READS:
    raise ValueError(f"read must be one of {READS}, got {read!r}")
  if erase_of not in ERASES:
    raise ValueError(f"erase_of must be one of {ERASES}, got {erase_of!r}")
  if (S is None) != (rates.log_beta is None):
    raise ValueError("momentum needs both S and log_beta, got only one of them")
  if isinstance(rates.erase, str) and rates.erase not in SHARED:
    raise ValueError(
      f"rates.erase must be an array, None or one of {SHARED}, got "
      f"{rates.erase!r}"
    )
