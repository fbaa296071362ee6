"""Mamba: a selective state-space layer (arXiv 2312.00752), half of Samba.

    x, z = u W_x, u W_z;   x = SiLU(conv4(x) + b_x)                 I = 2 D wide
    (r, B, C) = x W_dbc;   dt = softplus(r W_dt + b_dt);  A = -exp(A_log)
    h <- exp(dt A) h + (dt x) B^T                              h (I, N), N = 16
    y = h C + D_skip x;    out = (y * SiLU(z)) W_o

In the words of Nested Learning: a memory of N numbers a channel, with the
objective -<h, x B^T>, gradient descent and a retention of its own for each
number (docs/mathematics.md 6). The recurrence (`kernels.selective_scan`) runs
in chunks; the result does not depend on them, so documents may begin anywhere.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nl_jax import types
from nl_jax.kernels import selective_scan as ops
from nl_jax.kernels.rank_one import segments
from nl_jax.models import layers
from nl_jax.models import leaves as leaf

EXPAND = 2  # I = 2 D.
_DT_RANGE = (1e-3, 0.1)  # Start of softplus(b_dt).
_DT_FLOOR = 1e-4


class MambaState(NamedTuple):
  """What one layer carries from call to call; its size does not grow.

  Attributes:
    convs: {"x"}: the window of the short convolution.
    h_BxIxN: float32 at least.
  """

  convs: dict[str, layers.ConvState]
  h_BxIxN: types.Array


def rank(width: int) -> int:
  """R, the inner width of the step sizes: D / 16, rounded up."""
  return -(-width // 16)


def leaves(width: int, depth: int, state_dim: int) -> dict[str, leaf.Leaf]:
  """The parameters of one layer.

  w_x, w_z (D,I), conv_x (4,I), b_x (I,), w_dbc (I,R+2N), w_dt (R,I), b_dt (I,),
  A_log (I,N), D_skip (I,), w_o (I,D). W_in of the paper is w_x and w_z side by
  side.

  Args:
    width: D.
    depth: layers L of the model, for the start of w_o.
    state_dim: N.
  """
  D, N, inner, R = width, state_dim, EXPAND * width, rank(width)
  w_dbc = leaf.kernel((inner, R + 2 * N), ("heads", "head_dim"), 3)
  w_dt = leaf.Leaf((R, inner), ("head_dim", "heads"), _steps, True, True, (4,))
  std = layers.residual_std(depth)
  return {
    "w_x": leaf.kernel((D, inner), leaf.IN, 0),
    "w_z": leaf.kernel((D, inner), leaf.IN, 1),
    "conv_x": leaf.conv(inner, 2),
    "b_x": leaf.constant((inner,), ("heads",)),
    "w_dbc": w_dbc,
    "w_dt": w_dt,
    "b_dt": leaf.Leaf((inner,), ("heads",), _step_bias, key=(5,)),
    "A_log": leaf.Leaf((inner, N), ("heads", "mem_in"), _decays),
    "D_skip": leaf.constant((inner,), ("heads",), 1.0),
    "w_o": leaf.kernel((inner, D), leaf.OUT, 6, std),
  }


def _steps(key: types.Array, shape: tuple[int, ...]) -> types.Array:
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _step_bias(key: types.Array, shape: tuple[int, ...]) -> types.Array:
  low, high = (math.log(x) for x in _DT_RANGE)
  dt = jax.random.uniform(key, shape, jnp.float32, low, high)
  dt = jnp.maximum(jnp.exp(dt), _DT_FLOOR)
  # The inverse of softplus: dt + log(1 - exp(-dt)).
  return dt + jnp.log(-jnp.expm1(-dt))


def _decays(_: types.Array, shape: tuple[int, ...]) -> types.Array:
  A_N = jnp.arange(1, shape[1] + 1, dtype=jnp.float32)
  return jnp.broadcast_to(jnp.log(A_N)[None], shape)


def apply(
  params: types.Params,
  x_BxTxD: types.Array,
  state: MambaState | None,
  segment_ids: types.Array | None,
  *,
  chunk: int,
  walk: str = "auto",
) -> tuple[types.Array, MambaState]:
  """Mixes the tokens of one layer.

  Args:
    params: of one layer.
    x_BxTxD: normalised input.
    state: to resume from; None at the start of a sequence.
    segment_ids: int32 [B,T], 0 is padding; None continues the document.
    chunk: tokens whose states are there at once; changes no number.
    walk: what runs the chunks, of `layers.WALKS`.

  Returns:
    y_BxTxD and the state after the call.
  """
  wide, fresh = layers.at_least_float32(x_BxTxD.dtype), state is None
  if state is None:
    state = init_state(params, x_BxTxD.shape[0], x_BxTxD.dtype)
  window = state.convs["x"]
  x_BxTxI, after = layers.conv_apply(
    params["conv_x"],
    layers.dense(x_BxTxD, params["w_x"]),
    None if fresh else window,
    segment_ids,
  )
  x_BxTxI = jax.nn.silu(x_BxTxI + _vector(params["b_x"], x_BxTxI.dtype))
  dbc = layers.dense(x_BxTxI, params["w_dbc"])
  R, N = params["w_dt"].shape[0], params["A_log"].shape[1]
  r, B_BxTxN, C_BxTxN = jnp.split(dbc, [R, R + N], axis=-1)
  dt = layers.dense(r, params["w_dt"]).astype(wide)
  dt_BxTxI = jax.nn.softplus(dt + _vector(params["b_dt"], wide))
  begins_BxT = None
  if segment_ids is not None:
    dt_BxTxI = jnp.where(segment_ids[..., None] > 0, dt_BxTxI, 0.0)
    begins_BxT = _begins(segment_ids, window.segment_Bx3[:, -1])
  A_IxN = -jnp.exp(params["A_log"].astype(wide))
  run = layers.run(walk)
  y_BxTxI, h_BxIxN = ops.selective_scan(
    dt_BxTxI, x_BxTxI, B_BxTxN.astype(wide), C_BxTxN.astype(wide), A_IxN,
    state.h_BxIxN, begins_BxT, chunk=chunk,
    implementation=run.implementation, spec=run.spec,
  )  # fmt: skip
  y_BxTxI = y_BxTxI + _vector(params["D_skip"], wide) * x_BxTxI.astype(wide)
  gate = jax.nn.silu(layers.dense(x_BxTxD, params["w_z"]))
  out = layers.dense(y_BxTxI.astype(gate.dtype) * gate, params["w_o"])
  return out, MambaState({"x": after}, h_BxIxN)


def _vector(b: types.Array, dtype: jnp.dtype) -> types.Array:
  return b.astype(dtype)[None, None]


def _begins(segment_ids: types.Array, previous_B: types.Array) -> types.Array:
  """bool [B,T], the first token of a document other than the carried one."""
  index = segments.running_index(segment_ids, previous_B)
  return jnp.diff(index, axis=1, prepend=0) > 0


def init_state(
  params: types.Params, batch_size: int, dtype: jnp.dtype
) -> MambaState:
  """The state of one layer at the start of a sequence.

  Args:
    params: of one layer.
    batch_size: B.
    dtype: of activations.
  """
  A_log = params["A_log"]
  wide = jnp.result_type(A_log, jnp.float32)
  window = layers.conv_state(batch_size, A_log.shape[0], dtype)
  return MambaState({"x": window}, jnp.zeros((batch_size, *A_log.shape), wide))
