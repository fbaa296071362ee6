"""Products of a chunk function, by precision, and the inverse it solves with.

A product names its form ("nn" x y, "nt" x y^T, "tn" x^T y over the last two
axes) and its kind, what it is for; a policy says how precise each kind is. The
same code runs in XLA and inside a TPU kernel, where two things differ: several
leading axes are one (Mosaic takes one batch axis), and the derivative stays in
the three forms, since that of `dot_general` ends in transposes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

_FORMS = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}  # Axes that are summed.
_DERIVATIVES = {  # (form, operands) of both cotangents; "g" is the incoming.
  "nn": (("nt", "gy"), ("tn", "xg")),
  "nt": (("nn", "gy"), ("tn", "gx")),
  "tn": (("nt", "yg"), ("nn", "xg")),
}


@dataclasses.dataclass(frozen=True)
class Policy:
  """How many bfloat16 passes each kind of product takes.

  "full": the precision of the operands, six passes on a TPU. "x3": both
  operands as a high and a low part, without low times low. "x2": only the
  second operand split. "x1": one pass.

  Attributes:
    name: for messages and tables.
    anchor: what the gradient point makes of its inputs.
    state: products with the state, and its update.
    gram: u u^T; exact in one pass where u has the values of bfloat16.
    inverse: rounds of the inverse; "newton1" and "newton2" take one pass a
      round and then as many Newton steps, whose residual takes three.
    solve: the inverse applied, and its derivative.
    read: what the caller sees.
    rounded: layer inputs are rounded to bfloat16 once, for all products.
    steady: the rates of rounded keys are changed so that each erases as much
      as before. With rates beyond 1 a token turns what lies along its key
      around, and what rounding adds to the key's length would add up.
  """

  name: str
  anchor: str
  state: str
  gram: str
  inverse: str
  solve: str
  read: str
  rounded: bool
  steady: bool = False


F32 = Policy(
  "f32", "full", "full", "full", "full", "full", "full", rounded=False
)
LEAN = Policy("lean", "x1", "x2", "x1", "newton1", "x3", "x1", rounded=True)
# Rates beyond 1: the inverse is worse conditioned, and weights along a key that
# comes again and again are large, so that reads are small differences.
LEAN2 = dataclasses.replace(
  LEAN, name="lean2", inverse="newton2", read="x3", steady=True
)
POLICIES = {policy.name: policy for policy in (F32, LEAN, LEAN2)}


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  high = x.astype(jnp.bfloat16)
  return high, (x - high.astype(x.dtype)).astype(jnp.bfloat16)


def _product(x: jax.Array, y: jax.Array, form: str, how: str) -> jax.Array:
  i, j = _FORMS[form]
  lead = x.ndim - 2
  batch = tuple(range(lead))
  dot = functools.partial(
    jax.lax.dot_general,
    dimension_numbers=(((lead + i,), (lead + j,)), (batch, batch)),
  )
  if how == "full":
    return dot(x, y, precision=jax.lax.Precision.HIGHEST)
  dot = functools.partial(dot, preferred_element_type=jnp.float32)
  if how == "x1":
    return dot(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))
  (x0, x1), (y0, y1) = _halves(x), _halves(y)
  if how == "x2":
    return dot(x0, y0) + dot(x0, y1)
  return dot(x0, y0) + (dot(x0, y1) + dot(x1, y0))


def _rows_first(
  x: jax.Array, y: jax.Array, *, form: str, how: str
) -> jax.Array:
  """`_product`; a CPU is slow to sum over the rows of both."""
  if form == "tn":
    x, form = jnp.swapaxes(x, -1, -2), "nn"
  return _product(x, y, form, how)


def _transposed(
  which: int, g: jax.Array, x: Any, y: Any, *, form: str, how: str
) -> jax.Array:
  other, names = _DERIVATIVES[form][which]
  of = {"x": x, "y": y, "g": g}
  return _product_p.bind(of[names[0]], of[names[1]], form=other, how=how)


def _batched(
  arrays: Sequence[jax.Array], axes: Sequence[int | None], **how: str
) -> tuple[jax.Array, int]:
  size = next(x.shape[a] for x, a in zip(arrays, axes) if a is not None)
  lay = lambda x, a: (
    jnp.broadcast_to(x[None], (size, *x.shape))
    if a is None
    else jnp.moveaxis(x, a, 0)
  )
  return _product_p.bind(*map(lay, arrays, axes), **how), 0


def _out(x: Any, y: Any, *, form: str, how: str) -> jax.core.ShapedArray:
  i, j = _FORMS[form]
  shape = (*x.shape[:-2], x.shape[-1 - i], y.shape[-1 - j])
  dtype = x.dtype if how == "full" else jnp.float32
  return jax.core.ShapedArray(shape, dtype)


# In XLA too the derivative stays in the three forms, and as precise as the
# product: that of `dot_general` with respect to its second operand is the
# transpose of a product, for which a CPU takes twice the time. A primitive that
# is linear in each operand, so that it has derivatives of both modes.
_product_p = core.Primitive("product")
_product_p.def_impl(_rows_first)
_product_p.def_abstract_eval(_out)
ad.defbilinear(
  _product_p,
  functools.partial(_transposed, 0),
  functools.partial(_transposed, 1),
)
batching.primitive_batchers[_product_p] = _batched
mlir.register_lowering(
  _product_p, mlir.lower_fun(_rows_first, multiple_results=False)
)


def _by_head(x: jax.Array, y: jax.Array, form: str, how: str) -> jax.Array:
  """`_product` of [G, a, b], a head at a time.

  Mosaic lays out again what is cast, at five times the price of the cast,
  unless all that takes it is products themselves, and no slices of a batch.
  """
  if how == "full":
    return _product(x, y, form, how)
  if form == "tn" and how != "x1":
    # Of few tokens: all passes as one sum, as deep as the matrix unit.
    x, y, how = *_stacked(x, y, how), "x1"
  return jnp.stack([_product(a, b, form, how) for a, b in zip(x, y)])


def _stacked(
  x: jax.Array, y: jax.Array, how: str
) -> tuple[jax.Array, jax.Array]:
  """Rows whose x^T y in one pass are those of "x2" or "x3"."""
  low = lambda z: z - z.astype(jnp.bfloat16).astype(z.dtype)
  xs, ys = [x, x], [y, low(y)]
  if how == "x3":
    xs, ys = [*xs, low(x)], [*ys, y]
  rows = lambda parts: jnp.concatenate(parts, axis=-2)
  return rows(xs), rows(ys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fused_product(
  x: jax.Array, y: jax.Array, form: str, how: str
) -> jax.Array:
  return _by_head(x, y, form, how)


def _fused_fwd(x: jax.Array, y: jax.Array, form: str, how: str):
  return _fused_product(x, y, form, how), (x, y)


def _fused_bwd(form: str, how: str, kept, g: jax.Array):
  of = {"x": kept[0], "y": kept[1], "g": g}
  return tuple(
    _fused_product(of[names[0]], of[names[1]], other, how)
    for other, names in _DERIVATIVES[form]
  )


_fused_product.defvjp(_fused_fwd, _fused_bwd)


@jax.custom_jvp
def _rounded(x: jax.Array) -> jax.Array:
  return x.astype(jnp.bfloat16).astype(x.dtype)


@_rounded.defjvp
def _rounded_jvp(primals, tangents):
  return _rounded(*primals), tangents[0]


@dataclasses.dataclass(frozen=True)
class Tile:
  """Where a chunk function runs, and how precisely.

  Attributes:
    policy: of its products.
    fused: inside a TPU kernel.
    pack: heads whose C x C matrices are laid into one block diagonal matrix,
      so that it fills the 128 rows of the matrix unit.
  """

  policy: Policy = F32
  fused: bool = False
  pack: int = 1

  def mm(
    self, x: jax.Array, y: jax.Array, form: str = "nn", kind: str = "read"
  ) -> jax.Array:
    """x y, x y^T or x^T y over the last two axes; leading axes broadcast.

    Args:
      x, y: [..., a, b]; form: "nn", "nt" or "tn".
      kind: what it is for, a field of `Policy`; "exact" is full precision
        by any policy.
    """
    how = "full" if kind == "exact" else getattr(self.policy, kind)
    return self._mm(x, y, form, how)

  def _mm(self, x: jax.Array, y: jax.Array, form: str, how: str) -> jax.Array:
    lead = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x = jnp.broadcast_to(x, (*lead, *x.shape[-2:]))
    y = jnp.broadcast_to(y, (*lead, *y.shape[-2:]))
    if not self.fused:
      return _product_p.bind(x, y, form=form, how=how)
    flat = lambda z: z.reshape(-1, *z.shape[-2:])
    out = _fused_product(flat(x), flat(y), form, how)
    return out.reshape(*lead, *out.shape[-2:])

  def rounded(self, x: jax.Array) -> jax.Array:
    """Layer inputs as the policy takes them; gradients pass."""
    return _rounded(x) if self.policy.rounded else x

  def keys(self, k: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys as the policy takes them, and rates that go with them.

    Args:
      k: [..., C, K]; rate: [..., C, 1], at which each token erases and writes.
    """
    u = self.rounded(k)
    if not self.policy.steady:
      return u, rate
    size = lambda x: jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    before, after = size(k), size(u)
    same = jnp.where(after > 0, before / jnp.where(after > 0, after, 1.0), 1.0)
    return u, rate * jax.lax.stop_gradient(same)

  def row(self, column: jax.Array) -> jax.Array:
    """[..., P, 1] to [..., 1, P]."""
    if not self.fused:
      return jnp.swapaxes(column, -1, -2)
    # By a masked sum: Mosaic would transpose whole registers.
    return jnp.sum(self._diagonal(column), axis=-2, keepdims=True)

  def column(self, row: jax.Array) -> jax.Array:
    """[..., 1, P] to [..., P, 1]."""
    if not self.fused:
      return jnp.swapaxes(row, -1, -2)
    return jnp.sum(self._diagonal(row), axis=-1, keepdims=True)

  def _diagonal(self, x: jax.Array) -> jax.Array:
    size = max(x.shape[-2:])
    shape = (*x.shape[:-2], size, size)
    t = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    u = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return jnp.where(t == u, x, 0.0)

  def inverse(self, L: jax.Array, block: int) -> jax.Array:
    """(I + L)^{-1} for L [..., P, P], strictly lower in blocks of `block`.

    Doubles the size of the inverted diagonal blocks at each round, by products
    alone, so it is backward stable; `block` is a power of two.
    """
    if not self.fused:
      return _inverse(L, self, block)
    flat = L.reshape(-1, *L.shape[-2:])
    return _fused_inverse(flat, self, block).reshape(L.shape)


EXACT = Tile()


def _invert(L: jax.Array, tile: Tile, block: int) -> jax.Array:
  how = tile.policy.inverse
  steps = int(how[-1]) if how.startswith("newton") else 0
  how = "x1" if steps else how
  shape = L.shape[-2:]
  t = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  u = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  wide = lambda mask: mask.reshape((1,) * (L.ndim - 2) + shape)
  eye = wide(jnp.where(t == u, 1.0, 0.0).astype(L.dtype))
  X, b = eye, 0
  while 1 << b < block:
    off = (t >> (b + 1)) == (u >> (b + 1))
    off &= ((t >> b) & 1) > ((u >> b) & 1)
    part = jnp.where(wide(off), L, 0.0)
    if b:
      part = tile._mm(X, tile._mm(part, X, "nn", how), "nn", how)
    X, b = X - part, b + 1
  for _ in range(steps):
    left = X - eye + tile._mm(L, X, "nn", "x3")
    X = X - tile._mm(X, left, "nn", "x1")
  return X


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _inverse(L: jax.Array, tile: Tile, block: int) -> jax.Array:
  return _invert(L, tile, block)


@_inverse.defjvp
def _inverse_jvp(tile: Tile, block: int, primals, tangents):
  X = _inverse(*primals, tile, block)
  how = tile.policy.solve
  return X, -tile._mm(X, tile._mm(tangents[0], X, "nn", how), "nn", how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _fused_inverse(L: jax.Array, tile: Tile, block: int) -> jax.Array:
  return _invert(L, tile, block)


def _fused_inverse_fwd(L: jax.Array, tile: Tile, block: int):
  X = _fused_inverse(L, tile, block)
  return X, X


def _fused_inverse_bwd(tile: Tile, block: int, X: jax.Array, g: jax.Array):
  how = tile.policy.solve
  return (-tile._mm(tile._mm(X, g, "tn", how), X, "nt", how),)


_fused_inverse.defvjp(_fused_inverse_fwd, _fused_inverse_bwd)
