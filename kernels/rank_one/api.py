"""The one chunk algebra that every memory is made of (design.md 3)."""

from collections.abc import Callable

import jax

from nl_jax.kernels.rank_one import reference, xla
from nl_jax.kernels.rank_one import simplex as simplex_form

READS = ("after", "before", "chunk_start")
ERASES = ("deviation", "whole")
IMPLEMENTATIONS = ("reference", "xla")


def rank_one(
  U: jax.Array,
  Delta: jax.Array,
  Q: jax.Array | None,
  gates: tuple,
  W: jax.Array,
  S: jax.Array | None,
  R: jax.Array | None,
  *,
  read: str,
  erase_of: str,
  anchor: jax.Array | None = None,
  start: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  row: jax.Array | None = None,
  window: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  simplex: bool = False,
  lag: jax.Array | None = None,
  orthogonal: tuple[jax.Array, Callable] | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
  """Writes one chunk into one weight matrix, and reads it (model.md 2.3, 2.5).

  Leading axes are [B, H], or more ([B, H, roles]); size 1 broadcasts.

  Args:
    U: [B, H, C, a], the layer's inputs; Delta: [B, H, C, b], its errors, both
      taken at the anchor.
    Q: [B, H, C, a], what to read with, or None: only write.
    gates: (log_alpha, log_beta or None, write rate, erase rate or None, mask),
      each [B, H, C]; rates already proximal; mask is bool, and a masked token
      is an exact no-op. Logs must be <= 0.
    W: [B, H, a, b] at the start of the call; S: its momentum, or None.
    R: [B or 1, H, a, b], what retention decays to; None is 0.
    read: "after" (own write included), "before", or "chunk_start".
    erase_of: "deviation" erases from W - R, "whole" from W.
    anchor: the state that `chunk_start` reads see; default W.
    start: [B or 1, H, a, b], the state in which a new document begins.
    segment_ids: int32 [B, 1, C], 0 is padding; the first document is the one
      that W, S and anchor belong to. Needs `start`.
    row: [B or 1, H or 1, C], a factor on what token t reads of the changes
      since the anchor: it sees anchor + row_t (W_t - anchor), TTT's step
      sizes. W and S carry no factor: at the end of its chunk the caller
      scales them.
    window: (U, Delta, weights), h more tokens before the chunk, [B, H, h, ·],
      and [B, H, C, h + C]: token t writes sum_i weights_ti u_i^T delta_i in
      place of u_t^T delta_t. No weight but 0 for i > t, across documents and
      of masked tokens.
    simplex: W, anchor and start are logarithms of columns that sum to 1, each
      new W is made so again, and reads see exp W. Reference only without lag.
    lag: bool [B or 1, 1], with simplex: only the first token of the call, and
      only where this is set, makes W so again; reads see softmax(W).
    orthogonal: (rate [B, H, C], f), W moves by rate_t f(S_t) in place of S_t.
      Reference only, with momentum.
    implementation: "reference" (token loop), "xla" (chunk form), None = "xla".

  Returns:
    (reads [B, H, C, b] or None, W, S), the states after the last token.

  Raises:
    ValueError: an unknown switch, or gates that the form does not take.
  """
  if read not in READS:
    raise ValueError(f"read must be one of {READS}, got {read!r}")
  if erase_of not in ERASES:
    raise ValueError(f"erase_of must be one of {ERASES}, got {erase_of!r}")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"implementation of rank_one must be one of {IMPLEMENTATIONS}, got "
      f"{implementation!r}"
    )
  if (S is None) != (gates[1] is None):
    raise ValueError("momentum needs both S and log_beta, got only one of them")
  if segment_ids is not None and start is None:
    raise ValueError("segment_ids needs start: the state of a new document")
  form = reference if implementation == "reference" else xla
  if form is xla and not simplex and gates[0].ndim != U.ndim - 1:
    raise ValueError(
      "gates of one value a channel run only with "
      f"implementation='reference', got gates of rank {gates[0].ndim} for "
      f"inputs of rank {U.ndim}"
    )
  if simplex and (gates[3] is not None or row is not None or R is not None):
    raise ValueError(
      "simplex runs without an erase rate, a row factor and a state to decay to"
    )
  if simplex and form is xla and lag is None:
    raise ValueError(
      "simplex without lag runs only with implementation='reference'"
    )
  if orthogonal is not None and (form is xla or S is None):
    raise ValueError(
      "momentum made orthogonal at every token runs only with "
      "implementation='reference', and with S"
    )
  if simplex and form is xla:
    if S is not None or window is not None:
      raise ValueError("simplex runs without momentum and a window")
    return simplex_form.rank_one(
      U, Delta, Q, gates, W, lag=lag, read=read,
      anchor=W if anchor is None else anchor, start=start,
      segment_ids=segment_ids,
    )  # fmt: skip
  options = dict(simplex=True, lag=lag) if simplex else {}
  if orthogonal is not None:
    options["orthogonal"] = orthogonal
  return form.rank_one(
    U, Delta, Q, gates, W, S, R,
    read=read, erase_of=erase_of, anchor=anchor, start=start,
    segment_ids=segment_ids, row=row, window=window, **options,
  )  # fmt: skip
