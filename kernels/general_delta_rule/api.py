"""The delta rule with a decay for each channel and an erase of its own."""

import jax
from jax.sharding import PartitionSpec

from nl_jax.kernels import walk
from nl_jax.kernels.general_delta_rule import reference, xla

IMPLEMENTATIONS = ("reference", *walk.IMPLEMENTATIONS)


def general_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array,
  erase: tuple[jax.Array, jax.Array],
  state: jax.Array,
  begins: jax.Array | None = None,
  *,
  chunk: int = 64,
  remat_group: int = 4,
  implementation: str | None = None,
  spec: PartitionSpec | None = None,
  block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """S <- diag(exp w) S - b^T (a S) + k^T v, read at each token as q S.

  The rule of RWKV-7 (arXiv 2503.14456; docs/mathematics.md 6), and with a =
  (erase gate * k) exp w and b = k that of Gated DeltaNet-2. With one decay a
  head, a = k and b = rate k it is what `rank_one` has, the erase on the state
  before it decays. The result does not depend on the chunk.

  Args:
    q, k, v: [B,T,H,K], [B,T,H,K], [B,T,H,V]; where one is bfloat16, products
      are those of the policy "lean" of `kernels.walk`.
    log_decay: w, [B,T,H,K], at most 0; their sum over a chunk above -60, with
      `block` over a block of tokens alone, above -80.
    erase: (a, b), what is looked up and where it is taken away, [B,T,H,K]. A
      token with w = 0, b = 0 and k = 0 is a no-op.
    state: S [B,H,K,V], at least float32.
    begins: bool [B,T], tokens that begin a new document, from S = 0; None:
      none does.
    chunk: tokens computed at once.
    remat_group: chunks between two states that are kept for the backward pass.
    implementation: "reference" (token loop), or what runs the chunk form, see
      `kernels.walk`: "xla", "pallas_tpu", "pallas_interpret"; None: the kernel
      on a TPU where it takes the call, else "xla". One token is always "xla".
    spec: mesh axes of [B,T,H*K].
    block: tokens whose decays are counted from an origin of their own, for
      decays that a whole chunk would take out of float32; None: the chunk.

  Returns:
    y [B,T,H,V] and the state after the last token.

  Raises:
    ValueError: an unknown implementation, or one that was named and does not
      take the call.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      "implementation of general_delta_rule must be one of "
      f"{IMPLEMENTATIONS}, got {implementation!r}"
    )
  arguments = (q, k, v, log_decay, erase, state, begins)
  if implementation == "reference":
    return reference.general_delta_rule(*arguments)
  return xla.general_delta_rule(
    *arguments, chunk=chunk, remat_group=remat_group,
    implementation=implementation, spec=spec, block=block,
  )  # fmt: skip
