"""Causal attention of a whole text by JAX's own TPU kernel, splash attention.

The kernel is `jax.experimental.pallas.ops.tpu.splash_attention`: blocks of
queries against blocks of keys, those that the mask leaves empty skipped, and a
running softmax; the backward pass makes the weights again from their
normaliser. Here stand its shape conditions, its place on a mesh (the compiler
cannot split it, so each device runs it on its own rows and heads, and on its
own queries of a row, whose keys and values it gathers) and its masks. It has
one derivative, not two.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nl_jax.kernels import placement

_BLOCKS = (512, 256, 128)  # Tokens; the largest that divides a device's.
_DTYPES = ("float32", "bfloat16")
_WHOLE = P()
# Of outputs and normalisers, for policies of `jax.checkpoint`.
NAME = "attention"


def supports(
  q: jax.Array | jax.ShapeDtypeStruct,
  k: jax.Array | jax.ShapeDtypeStruct,
  *,
  spec: P = _WHOLE,
  interpret: bool = False,
) -> str | None:
  """Why the kernel cannot attend, or None where it can.

  Args:
    q: [B,T,H,K]; k: [B,T,G,K].
    spec: mesh axes of batch, tokens, heads and features.
    interpret: without a TPU, by the interpreter of kernels.
  """
  mesh = jax.sharding.get_abstract_mesh()
  tokens = q.shape[1]
  platform = placement.platform()
  if not interpret and platform != "tpu":
    return f"it needs a TPU, got the platform {platform!r}"
  if q.dtype not in _DTYPES:
    return f"it takes {' or '.join(_DTYPES)}, got {q.dtype}"
  parts = placement.parts(mesh, spec)
  if tokens % (_BLOCKS[-1] * parts[1]):
    least = _BLOCKS[-1] * parts[1]
    over = f" over {parts[1]} devices of mesh.sequence" * (parts[1] > 1)
    return (
      f"it takes a multiple of {least} tokens{over}, got {tokens}; nearest: "
      f"{-(-tokens // least) * least}"
    )
  if mesh.empty:
    if not interpret and jax.device_count() > 1:
      return "over several devices it needs a mesh: use jax.set_mesh"
    return None
  if parts[3] > 1:
    return "it does not split the features of a head"
  return placement.undivided(q, k, parts)


def splash_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None = None,
  *,
  window: int = 0,
  spec: P = _WHOLE,
  interpret: bool = False,
) -> jax.Array:
  """softmax(q k^T K^-1/2) v, causal, within documents and a window.

  Args:
    q: [B,T,H,K]; k, v: [B,T,G,K], each of their heads for H/G query heads next
      to each other.
    segment_ids: int32 [B,T], the document of each token: a token sees those of
      its own. Padding has an id as well, and sees itself.
    window: tokens that each token sees, itself included; 0: all before it.
    spec: mesh axes of batch, tokens, heads and features.
    interpret: without a TPU, by the interpreter of kernels.

  Returns:
    [B,T,H,K] in the dtype of q.

  Raises:
    ValueError: what `supports` says.
  """
  reason = supports(q, k, spec=spec, interpret=interpret)
  if reason is not None:
    raise ValueError(f"splash attention cannot run here: {reason}")

  mesh = jax.sharding.get_abstract_mesh()
  parts = placement.parts(mesh, spec)
  heads, tokens = q.shape[2] // parts[2], q.shape[1]
  kernel = _kernel(heads, tokens, window, interpret, parts[1])
  axis = (*spec, None, None)[1] if parts[1] > 1 else None

  def run(kernel, q, k, v, ids=None):
    q = (q * q.shape[-1] ** -0.5).astype(q.dtype)
    seen = (k, v, ids)
    if axis is not None:
      all_of = lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True)
      seen = jax.tree.map(all_of, seen)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q, *seen[:2])]
    if ids is None:
      y = jax.vmap(kernel)(*heads_first)
    else:
      one = lambda q, k, v, *ids: kernel(q, k, v, splash.SegmentIds(*ids))
      y = jax.vmap(one)(*heads_first, ids, seen[2])
    return jnp.swapaxes(y, 1, 2)

  arrays = (q, k, v) if segment_ids is None else (q, k, v, segment_ids)
  if mesh.empty or mesh.size == 1:
    return run(kernel, *arrays)
  # Each device has the mask of its own queries.
  own = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, axis)))
  specs = (own, *(spec,) * 3, *(P(*spec[:2]),) * (len(arrays) - 3))
  # The kernel does not say over which axes its outputs vary.
  shard = jax.shard_map(run, in_specs=specs, out_specs=spec, check_vma=False)
  return shard(kernel, *arrays)


def share(tokens: int, window: int = 0) -> float:
  """The part of the blocks of queries and keys that the mask does not leave.

  Args:
    tokens: T of a row, as `supports` has it.
    window: as `splash_attention`.
  """
  block = _block(tokens)
  count = tokens // block
  reach = -(-(window - 1) // block) if window else count
  kept = sum(min(i, reach) + 1 for i in range(count))
  return kept / count**2


def _block(tokens: int, shards: int = 1) -> int:
  """Tokens of a block, which divide those of a device."""
  return next((b for b in _BLOCKS if tokens % (b * shards) == 0), tokens)


def _kernel(
  heads: int, tokens: int, window: int, interpret: bool, shards: int
) -> splash.splash_attention_kernel.SplashAttentionKernel:
  """The kernel of one row, [H,T,K] and [G,T,K]; its masks are of all shards."""
  shape = (tokens, tokens)
  mask: splash.LocalMask | splash.CausalMask
  if window and window < tokens:
    mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
  else:
    mask = splash.CausalMask(shape)
  block = _block(tokens, shards)
  names = (
    "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
    "block_kv_dkv_compute", "block_q_dq", "block_kv_dq",
  )  # fmt: skip
  sizes: Any = dict.fromkeys(names, block)
  return splash.splash_attention_kernel.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    head_shards=1,
    q_seq_shards=shards,
    block_sizes=splash.splash_attention_kernel.BlockSizes(**sizes),
    residual_checkpoint_name=NAME,
    interpret=interpret,
  )
