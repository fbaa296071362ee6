"""One weight matrix whose columns stay on a simplex (Memora)."""

import jax

from nl_jax.kernels.rank_one import READS, Rates
from nl_jax.kernels.simplex import reference, xla

IMPLEMENTATIONS = ("reference", "xla")


def simplex(
  U: jax.Array,
  Delta: jax.Array,
  Q: jax.Array | None,
  rates: Rates,
  A: jax.Array,
  *,
  lag: jax.Array | None = None,
  read: str,
  anchor: jax.Array | None = None,
  start: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array | None, jax.Array]:
  """Writes one chunk into one weight matrix W = softmax(A), and reads it.

      A <- log softmax(alpha A - write u^T delta),   softmax over the rows of A

  Leading axes are any, the same for all; size 1 broadcasts.

  Args:
    U: [..., C, a], the layer's inputs; Delta: [..., C, b], its errors, both
      taken at the anchor.
    Q: [..., C, a], what to read with, or None: only write.
    rates: without momentum and erase; log_alpha and write are [..., C, 1], or
      one value for each row or column of A, [..., C, a, 1] or [..., C, 1, b].
    A: [..., a, b], logarithms of columns that sum to 1.
    lag: bool [..., 1, 1]: the columns are made to sum to 1 at the first token
      of the call alone, where this is set, and at no other; reads see
      softmax(A) all the same. None: they are at every token.
    read: "after" (own write included), "before", or "chunk_start".
    anchor: the logarithms that `chunk_start` reads see; default A.
    start: [..., a, b], those in which a new document begins.
    segment_ids: int32 [..., C], 0 is padding; the first document is the one
      that A and anchor belong to. Needs `start`.
    implementation: "reference" (token loop), "xla" (chunk form, with `lag`
      alone), None: "xla" where there is `lag`.

  Returns:
    (reads [..., C, b] or None, A after the last token).

  Raises:
    ValueError: an unknown switch, or rates that there are not.
  """
  if read not in READS:
    raise ValueError(f"read must be one of {READS}, got {read!r}")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"implementation of simplex must be one of {IMPLEMENTATIONS}, got "
      f"{implementation!r}"
    )
  if rates.log_beta is not None or rates.erase is not None:
    raise ValueError("simplex runs without momentum and without an erase rate")
  if segment_ids is not None and start is None:
    raise ValueError("segment_ids needs start: the state of a new document")
  if implementation == "xla" and lag is None:
    raise ValueError(
      "simplex without lag runs only with implementation='reference'"
    )
  form = reference if lag is None or implementation == "reference" else xla
  return form.simplex(
    U, Delta, Q, rates, A,
    lag=lag, read=read, anchor=A if anchor is None else anchor, start=start,
    segment_ids=segment_ids,
  )  # fmt: skip
