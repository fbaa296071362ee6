"""Products of a chunk function, by precision, and the inverse it solves with.

A product names its form ("nn" x y, "nt" x y^T, "tn" x^T y over the last two
axes) and its kind, what it is for; a policy says how precise each kind is. The
same code runs in XLA and inside a TPU kernel, where two things differ: several
leading axes are one (Mosaic takes one batch axis), and the derivative stays in
the three forms, since that of `dot_general` ends in transposes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
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

  def solve(
    self,
    systems: Sequence[tuple[jax.Array, jax.Array]],
    block: int,
    derivative: str = "solve",
  ) -> list[jax.Array]:
    """x of (I + L) x = rows, of several systems by one batch of inverses.

    Doubles the size of the inverted diagonal blocks at each round, by products
    alone, so it is backward stable.

    Args:
      systems: (L [..., P, P], rows [..., P, b]) each, all L of one shape and
        strictly lower in blocks of `block`.
      block: a power of two.
      derivative: kind of the product that is the gradient of L.
    """
    if block == 1:
      return [rows for _, rows in systems]
    one = len(systems) == 1
    L = systems[0][0] if one else jnp.stack([L for L, _ in systems])
    if self.fused:
      flat = jax.lax.stop_gradient(L).reshape(-1, *L.shape[-2:])
      X = _invert(flat, self, block).reshape(L.shape)
    else:
      X = _inverse(L, self, block)
    run: Any = _fused_solve if self.fused else _solve
    return [
      run(L, X if one else X[i], rows, self, derivative)
      for i, (L, rows) in enumerate(systems)
    ]


EXACT = Tile()


def _invert(L: jax.Array, tile: Tile, block: int) -> jax.Array:
  """(I + L)^{-1} for L [..., P, P], strictly lower in blocks of `block`."""
  how, size = tile.policy.inverse, L.shape[-1]
  steps = int(how[-1]) if how.startswith("newton") else 0
  mm = functools.partial(tile._mm, form="nn", how="x1" if steps else how)
  wide = lambda mask: mask.reshape((1,) * (L.ndim - 2) + mask.shape)
  t, u = _places(size)
  eye = wide(jnp.where(t == u, 1.0, 0.0).astype(L.dtype))
  X, b = eye, 0
  if tile.fused and block >= _SMALL:
    X, b = _small_inverses(L), _SMALL.bit_length() - 1
  while 1 << b < block:
    off = (t >> (b + 1)) == (u >> (b + 1))
    off &= ((t >> b) & 1) > ((u >> b) & 1)
    part = jnp.where(wide(off), L, 0.0)
    if tile.fused and 1 << b >= _SMALL:
      X = _doubled(X, part, 1 << b, mm)
    else:
      X = X - (mm(X, mm(part, X)) if b else part)
    b += 1
  for step in range(steps):
    if step:
      made = tile._mm(L, X, "nn", "x3")
    else:  # What rounding X does the step repairs; L X is then two passes.
      X = _rounded(X)
      made = mm(jnp.concatenate([L, L - _rounded(L)], axis=-2), X)
      made = made[..., :size, :] + made[..., size:, :]
    X = X - mm(X, X - eye + made)
  return X


_SMALL, _LANES = 8, 128  # Rows and lanes of a register.


def _places(size: int) -> tuple[jax.Array, jax.Array]:
  """Row and column of each entry, int32 [size, size]."""
  iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)
  return iota(0), iota(1)


def _small_inverses(L: jax.Array) -> jax.Array:
  """The inverse of blocks of 8 on the diagonal of I + L, [R, P, P].

  The blocks stand side by side in one register for each P = 128, and are
  solved a row after the other, exactly; a product of the matrix unit would
  have 128 columns for 8.
  """
  R, size, _ = L.shape
  t, u = _places(size)
  own = ((t >> 3) == (u >> 3))[None]
  rows = jnp.where(own, L, 0.0).reshape(R, size // _SMALL, _SMALL, size)
  rows = jnp.sum(rows, axis=1)
  if spare := -size % _LANES:
    empty = jnp.zeros((R, _SMALL, spare), L.dtype)
    rows = jnp.concatenate([rows, empty], axis=-1)
  wide = size + spare
  lane = jax.lax.broadcasted_iota(jnp.int32, (R, _SMALL, wide), 2) & 7
  row = jax.lax.broadcasted_iota(jnp.int32, (R, _SMALL, wide), 1)
  X = jnp.where(row == lane, 1.0, 0.0)
  for j in range(_SMALL - 1):
    # Column j of each block, on all lanes up to j: right of it X_j is 0.
    column, width = jnp.where(lane == j, rows, 0.0), 1
    while width <= j:
      column = column + pltpu.roll(column, wide - width, 2)
      width *= 2
    X = X - column * X[:, j : j + 1]
  X = X[:, None, :, :size]
  X = jnp.broadcast_to(X, (R, size // _SMALL, _SMALL, size))
  return jnp.where(own, X.reshape(R, size, size), 0.0)


def _doubled(
  X: jax.Array,
  part: jax.Array,
  size: int,
  mm: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """X - X part X, where every second `size` rows of `part` are 0.

  Args:
    X: the inverse of blocks of `size`, [R, P, P].
    part: what stands below them in blocks twice as large.
    size: at least the 8 rows of a register.
    mm: x y.
  """
  R, P, _ = X.shape
  halves = lambda Z: Z.reshape(R, P // (2 * size), 2, size, P)
  lower = lambda Z: halves(Z)[:, :, 1].reshape(R, P // 2, P)

  def whole(upper: jax.Array, low: jax.Array) -> jax.Array:
    both = upper, low.reshape(upper.shape)
    return jnp.stack(both, axis=2).reshape(R, P, P)

  upper = halves(X)[:, :, 0]
  made = whole(jnp.zeros_like(upper), mm(lower(part), X))
  return whole(upper, lower(X) - mm(lower(X), made))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _inverse(L: jax.Array, tile: Tile, block: int) -> jax.Array:
  return _invert(L, tile, block)


@_inverse.defjvp
def _inverse_jvp(tile: Tile, block: int, primals, tangents):
  X = _inverse(*primals, tile, block)
  how = tile.policy.solve
  return X, -tile._mm(X, tile._mm(tangents[0], X, "nn", how), "nn", how)


# The derivative of a solved system is a system of the same matrix: it asks for
# one product more than the solution, where that of the inverse asks for three.
@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _solve(
  L: jax.Array, X: jax.Array, rows: jax.Array, tile: Tile, derivative: str
) -> jax.Array:
  """X rows, where X is the inverse of I + L."""
  del L, derivative
  return tile.mm(X, rows, "nn", "solve")


@_solve.defjvp
def _solve_jvp(tile: Tile, derivative: str, primals, tangents):
  # The tangent of X says nothing that L's does not; a second derivative has
  # it, since X is read here.
  L, X, rows = primals
  out = _solve(L, X, rows, tile, derivative)
  change = tangents[2] - tile.mm(tangents[0], out, "nn", derivative)
  return out, tile.mm(X, change, "nn", "solve")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fused_solve(
  L: jax.Array, X: jax.Array, rows: jax.Array, tile: Tile, derivative: str
) -> jax.Array:
  del L, derivative
  return tile.mm(X, rows, "nn", "solve")


def _fused_solve_fwd(
  L: jax.Array, X: jax.Array, rows: jax.Array, tile: Tile, derivative: str
):
  out = _fused_solve(L, X, rows, tile, derivative)
  return out, (X, out)


def _fused_solve_bwd(tile: Tile, derivative: str, kept, g: jax.Array):
  X, out = kept
  change = tile.mm(X, g, "tn", "solve")
  return -tile.mm(change, out, "nt", derivative), None, change


_fused_solve.defvjp(_fused_solve_fwd, _fused_solve_bwd)
