"""Products of a chunk function, by precision, and the inverse it solves with.

A product names its form ("nn" x y, "nt" x y^T, "tn" x^T y over the last two
axes) and its kind, what it is for; a policy says how precise each kind is. The
same code runs in XLA and inside a TPU kernel, where two things differ: several
leading axes are one (Mosaic takes one batch axis), and the derivative stays in
the three forms, since that of `dot_general` ends in transposes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

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


F32 = Policy("f32", *["full"] * 6, rounded=False)
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


def _by_head(x: jax.Array, y: jax.Array, form: str, how: str) -> jax.Array:
  """`_product` of [G, a, b], a head at a time.

  Mosaic lays what is cast out anew, at five times the price of the cast,
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _split_product(
  x: jax.Array, y: jax.Array, form: str, how: str, by_head: bool
) -> jax.Array:
  """A product whose derivatives are products of the same precision.

  Of themselves, those of a product of bfloat16 would be bfloat16.
  """
  return (_by_head if by_head else _product)(x, y, form, how)


def _split_fwd(x: jax.Array, y: jax.Array, form: str, how: str, by_head: bool):
  return _split_product(x, y, form, how, by_head), (x, y)


def _split_bwd(form: str, how: str, by_head: bool, kept, g: jax.Array):
  of = {"x": kept[0], "y": kept[1], "g": g}
  return tuple(
    _split_product(of[names[0]], of[names[1]], other, how, by_head)
    for other, names in _DERIVATIVES[form]
  )


_split_product.defvjp(_split_fwd, _split_bwd)


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
      if how == "full":  # In forward mode too.
        return _product(x, y, form, how)
      return _split_product(x, y, form, how, False)
    flat = lambda z: z.reshape(-1, *z.shape[-2:])
    out = _split_product(flat(x), flat(y), form, how, True)
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
    alone, so it is backward stable (kernels.md 1.5); `block` is a power of
    two.
    """
    if self.fused:
      flat = L.reshape(-1, *L.shape[-2:])
      return _split_inverse(flat, self, block).reshape(L.shape)
    if self.policy.solve == "full":  # In forward mode too.
      return _inverse(L, self, block)
    return _split_inverse(L, self, block)


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
def _split_inverse(L: jax.Array, tile: Tile, block: int) -> jax.Array:
  return _invert(L, tile, block)


def _split_inverse_fwd(L: jax.Array, tile: Tile, block: int):
  X = _split_inverse(L, tile, block)
  return X, X


def _split_inverse_bwd(tile: Tile, block: int, X: jax.Array, g: jax.Array):
  how = tile.policy.solve
  return (-tile._mm(tile._mm(X, g, "tn", how), X, "nt", how),)


_split_inverse.defvjp(_split_inverse_fwd, _split_inverse_bwd)
