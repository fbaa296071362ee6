"""The recurrence of Mamba, a decay for each number of each channel."""

import jax
from jax.sharding import PartitionSpec

from nl_jax.kernels import walk
from nl_jax.kernels.selective_scan import chunked, reference

IMPLEMENTATIONS = ("reference", *walk.IMPLEMENTATIONS)


def selective_scan(
  dt: jax.Array,
  u: jax.Array,
  B: jax.Array,
  C: jax.Array,
  A: jax.Array,
  state: jax.Array,
  begins: jax.Array | None = None,
  *,
  chunk: int = 64,
  implementation: str | None = None,
  spec: PartitionSpec | None = None,
) -> tuple[jax.Array, jax.Array]:
  """h <- exp(dt A) h + (dt u) B^T, read at each token as h C.

  Mamba (arXiv 2312.00752; docs/mathematics.md 6). The result does not depend on
  the chunk.

  Args:
    dt, u: [B,T,I], step sizes and inputs; a token with dt = 0 is a no-op.
    B, C: [B,T,N], what is written along, and read.
    A: [I,N], negative.
    state: h [B,I,N], at least float32.
    begins: bool [B,T], tokens that begin a new document, from h = 0; None:
      none does.
    chunk: tokens computed at once.
    implementation: "reference" (token loop), or what runs the chunks, see
      `kernels.walk`: "xla", "pallas_tpu", "pallas_interpret"; None: the kernel
      on a TPU where it takes the call, else "xla". One token is always "xla".
    spec: mesh axes of [B,T,I].

  Returns:
    y [B,T,I] and the state after the last token.

  Raises:
    ValueError: an unknown implementation, or one that was named and does not
      take the call.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"implementation of selective_scan must be one of {IMPLEMENTATIONS}, got "
      f"{implementation!r}"
    )
  arguments = (dt, u, B, C, A, state, begins)
  if implementation == "reference":
    return reference.selective_scan(*arguments)
  return chunked.selective_scan(
    *arguments, chunk=chunk, implementation=implementation, spec=spec
  )
