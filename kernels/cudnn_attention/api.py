"""Causal attention of a whole text by cuDNN's flash attention.

The call is `jax.nn.dot_product_attention(implementation="cudnn")`. Here stand
the conditions under which it is taken, its place on a mesh (each device runs it
on its own rows and heads) and its masks. Windows and causality are the
kernel's own and cost no memory; documents are a bias of [B,1,T,T] in the dtype
of the queries, one for all heads. It has one derivative, not two.
"""

import jax
from jax.sharding import PartitionSpec as P

from nl_jax.kernels import placement

_DTYPES = ("bfloat16", "float16")
_WIDEST = 128  # Features of a head that every GPU since Ampere takes.
_WHOLE = P()


def supports(
  q: jax.Array | jax.ShapeDtypeStruct,
  k: jax.Array | jax.ShapeDtypeStruct,
  *,
  spec: P = _WHOLE,
) -> str | None:
  """Why cuDNN cannot attend, or None where it can.

  Args:
    q: [B,T,H,K]; k: [B,T,G,K].
    spec: mesh axes of batch, tokens, heads and features.
  """
  mesh = jax.sharding.get_abstract_mesh()
  platform = placement.platform()
  if platform not in ("gpu", "cuda"):
    return f"it needs an NVIDIA GPU, got the platform {platform!r}"
  if q.dtype not in _DTYPES:
    return f"it takes {' or '.join(_DTYPES)}, got {q.dtype}"
  if q.shape[3] % 8 or q.shape[3] > _WIDEST:
    return (
      f"it takes heads of a multiple of 8 features, at most {_WIDEST}, got "
      f"{q.shape[3]}"
    )
  if q.shape[1] % 2:
    return f"it takes an even number of tokens, got {q.shape[1]}"
  counts = placement.parts(mesh, spec)
  if counts[1] > 1 or counts[3] > 1:
    return "it splits neither the tokens of a row nor the features of a head"
  return placement.undivided(q, k, counts)


def cudnn_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None = None,
  *,
  window: int = 0,
  spec: P = _WHOLE,
) -> jax.Array:
  """softmax(q k^T K^-1/2) v, causal, within documents and a window.

  Args:
    q: [B,T,H,K]; k, v: [B,T,G,K], each of their heads for H/G query heads next
      to each other.
    segment_ids: int32 [B,T], the document of each token: a token sees those of
      its own. Padding has an id as well, and sees itself.
    window: tokens that each token sees, itself included; 0: all before it.
    spec: mesh axes of batch, tokens, heads and features.

  Returns:
    [B,T,H,K] in the dtype of q.

  Raises:
    ValueError: what `supports` says.
  """
  reason = supports(q, k, spec=spec)
  if reason is not None:
    raise ValueError(f"cuDNN's attention cannot run here: {reason}")

  def run(q, k, v, ids=None):
    mask = None
    if ids is not None:
      mask = (ids[:, :, None] == ids[:, None])[:, None]
    return jax.nn.dot_product_attention(
      q, k, v, mask=mask, is_causal=True, implementation="cudnn",
      local_window_size=(window - 1, 0) if window else None,
    )  # fmt: skip

  arrays = (q, k, v) if segment_ids is None else (q, k, v, segment_ids)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run(*arrays)
  specs = (spec, spec, spec, P(*spec[:2]))[: len(arrays)]
  shard = jax.shard_map(run, in_specs=specs, out_specs=spec, check_vma=False)
  return shard(*arrays)
