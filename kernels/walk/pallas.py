"""The walk over chunks as two TPU kernels, made from any chunk function.

Grid (rows, head groups, groups of `save` chunks), the last in order: the state
of a head group stays in VMEM over the whole walk. The forward kernel writes
the state at the start of each group of chunks. The backward kernel takes the
groups in reverse, makes the states within one again, and differentiates the
chunk function itself by `jax.vjp`, traced inside the kernel; the cotangents of
the state and of slow parameters stay in VMEM. Outputs that stand still along
the walk are its accumulators.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nl_jax.kernels.walk import contract, products

_f32 = jnp.float32

# A word a chunk: its real tokens are lo <= t < hi, lo in bits 0 to 7, hi in 8
# to 15; then flags. EDGE: the last chunk edge of the call is where this chunk
# begins; ENDS: it is where this chunk ends.
_RESETS, _CLOSES, _FIRST, _EDGE, _ENDS = range(16, 21)


@dataclasses.dataclass(frozen=True)
class How:
  """What is static.

  Attributes:
    body: the chunk function.
    tile: its products.
    chunk: C.
    heads: of a step, G.
    save: chunks of a step.
    name: of the kernels, before "_fwd" and "_bwd".
    limit: bytes of VMEM.
    interpret: as `pallas_call` takes it.
  """

  body: contract.Body
  tile: products.Tile
  chunk: int
  heads: int
  save: int
  name: str
  limit: int
  interpret: Any


def words(places: contract.Places) -> jax.Array:
  """int32 [B,N], what a kernel knows of a chunk."""
  real, closes = places.real, places.closes
  B, N, C = real.shape
  some = real.any(-1)
  low = jnp.argmax(real, -1).astype(jnp.int32)
  high = C - jnp.argmax(real[..., ::-1], -1).astype(jnp.int32)
  zero = jnp.zeros((B, N), bool)
  resets = zero if places.resets is None else places.resets
  first = ~zero if places.first is None else places.first
  # The edge is the start of the last chunk that did not close and has tokens,
  # or is the first after one that closed, unless the call ends at an edge. A
  # document that began inside has none: its edge is 0.
  closed = jnp.concatenate([~zero[:, :1], closes[:, :-1]], axis=1)
  open_ = ~closes & (some | closed | resets)
  last = jnp.arange(N)[None] == N - 1 - jnp.argmax(open_[:, ::-1], -1)[:, None]
  edge = open_ & last & ~closes[:, -1:]
  if places.ids is not None:
    edge &= (places.ids[..., -1] == 0) | ~some
  ends = closes & (jnp.arange(N) == N - 1)[None]
  out = jnp.where(some, low | high << 8, 0)
  for bit, flag in (
    (_RESETS, resets), (_CLOSES, closes), (_FIRST, first), (_EDGE, edge),
    (_ENDS, ends),
  ):  # fmt: skip
    out |= flag.astype(jnp.int32) << bit
  return out


def _flag(word: jax.Array, bit: int) -> jax.Array:
  return ((word >> bit) & 1) == 1


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _is_row(ref: jax.Array) -> bool:
  """One number a token and head: laid as [B,H/G,N,G,C], not [B,N*C,H*d]."""
  return ref.ndim == 5


def lay(x: jax.Array, heads: int, how: How) -> jax.Array:
  """[B,N*C,H*d] as a kernel takes it."""
  if x.shape[-1] != heads:
    return x
  x = x.reshape(x.shape[0], -1, how.chunk, heads // how.heads, how.heads)
  return x.transpose(0, 3, 1, 4, 2)


def unlay(x: jax.Array) -> jax.Array:
  """Back to [B,N*C,H*d]."""
  if not _is_row(x):
    return x
  x = x.transpose(0, 2, 4, 1, 3)
  return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1)


def _rows(ref: jax.Array, i: Any, how: How) -> tuple[Any, ...]:
  """Where the tokens of chunk i of a step are."""
  if _is_row(ref):
    return 0, 0, i
  C = how.chunk
  start = i * C if isinstance(i, int) else pl.multiple_of(i * C, C)
  return 0, pl.ds(start, C)


def _diagonal(how: How) -> jax.Array:
  shape = (how.heads, how.chunk, how.chunk)
  return _iota(shape, 1) == _iota(shape, 2)


def _load(ref: jax.Array, i: Any, how: How) -> jax.Array:
  """[G,C,d] of chunk i, float32."""
  x = ref[_rows(ref, i, how)].astype(_f32)
  if _is_row(ref):
    return jnp.sum(
      jnp.where(_diagonal(how), x[:, None, :], 0.0), -1, keepdims=True
    )
  d = x.shape[-1] // how.heads
  return jnp.stack([x[:, h * d : (h + 1) * d] for h in range(how.heads)])


def _store(ref: jax.Array, i: Any, how: How, x: jax.Array) -> None:
  """[G,C,d] into chunk i."""
  if _is_row(ref):
    x = jnp.sum(jnp.where(_diagonal(how), x, 0.0), -2)
  else:
    x = jnp.concatenate([x[h] for h in range(how.heads)], axis=-1)
  ref[_rows(ref, i, how)] = x.astype(ref.dtype)


def _chunk(how: How, word: jax.Array, ids: Any, i: Any) -> Callable[..., Any]:
  """(slow, state, x) -> (state, y, sums) of a chunk; ids [1,M,1,C] or None."""
  G, C = how.heads, how.chunk
  low, high = word & 255, (word >> 8) & 255

  def inside(shape: tuple[int, ...]) -> jax.Array:
    t = _iota(shape, 1)
    return (t >= low) & (t < high)

  number = lambda bit: jnp.full((G, 1, 1), ((word >> bit) & 1).astype(_f32))
  row = None if ids is None else jnp.broadcast_to(ids[0, i][None], (G, 1, C))
  at = contract.At(
    real=jnp.where(inside((G, C, 1)), 1.0, 0.0),
    ids=row,
    resets=number(_RESETS),
    closes=number(_CLOSES),
    first=number(_FIRST),
    anchor=None,
    tile=how.tile,
  )

  def run(slow: Any, state: contract.State, x: Any) -> Any:
    x = jax.tree.map(lambda x: jnp.where(inside(x.shape), x, 0.0), x)
    return how.body(slow, state, x, at)

  return run


def _clear(refs: Any) -> None:
  for ref in jax.tree.leaves(refs):
    ref[...] = jnp.zeros_like(ref)


def _copy(to: Any, values: Any) -> None:
  for ref, value in zip(jax.tree.leaves(to), jax.tree.leaves(values)):
    ref[...] = value.reshape(ref.shape)


def _own(refs: Any) -> Any:
  """Values of blocks [1, ...]."""
  return jax.tree.map(lambda ref: ref[0], refs)


def _loop(n: int, step: Callable[[Any], None]) -> None:
  if n == 1:
    step(0)
  else:
    jax.lax.fori_loop(0, n, lambda i, _: step(i), None)


def _forward_kernel(ins: dict, outs: dict, *, how: How) -> None:
  state, edges = outs["state"], outs["edges"]

  @pl.when(pl.program_id(2) == 0)
  def _():
    _copy(state, _own(ins["state"]))
    _clear((edges, outs["sums"]))

  def step(i: Any) -> None:
    word = ins["words"][0, i]
    pl.when(_flag(word, _RESETS))(lambda: _clear(state))
    if outs["saved"] is not None:

      @pl.when(i == 0)
      def _():
        _copy(outs["saved"], _own(state))

    pl.when(_flag(word, _EDGE))(lambda: _copy(edges, _own(state.w)))
    run = _chunk(how, word, ins["ids"], i)
    x = jax.tree.map(lambda ref: _load(ref, i, how), ins["xs"])
    slow = jax.tree.map(lambda ref: ref[...], ins["slow"])
    new, y, sums = run(slow, _own(state), x)
    _copy(state, new)
    jax.tree.map(lambda ref, y: _store(ref, i, how, y), outs["ys"], y)
    if sums is not None:
      outs["sums"][0] += sums.astype(_f32)
    pl.when(_flag(word, _ENDS))(lambda: _copy(edges, _own(state.w)))

  _loop(how.save, step)


def _backward_kernel(ins: dict, outs: dict, starts: Any, *, how: How) -> None:
  dstate, dslow = outs["state"], outs["slow"]
  slow = lambda: jax.tree.map(lambda ref: ref[...], ins["slow"])
  load = lambda refs, i: jax.tree.map(lambda ref: _load(ref, i, how), refs)

  @pl.when(pl.program_id(2) == 0)
  def _():
    _copy(dstate, _own(ins["dstate"]))
    _clear(dslow)

  def add_edge() -> None:
    jax.tree.map(ref_add, dstate.w, _own(ins["dedges"]))

  def ref_add(ref: jax.Array, value: jax.Array) -> None:
    ref[0] += value

  def ahead(i: Any) -> None:
    word, after = ins["words"][0, i], ins["words"][0, i + 1]
    at = lambda k: jax.tree.map(lambda ref: ref.at[k], starts)

    @pl.when(_flag(after, _RESETS))
    def _():
      _clear(at(i + 1))

    @pl.when(~_flag(after, _RESETS))
    def _():
      run = _chunk(how, word, ins["ids"], i)
      state = jax.tree.map(lambda ref: ref[i], starts)
      _copy(at(i + 1), run(slow(), state, load(ins["xs"], i))[0])

  if how.save > 1:
    _copy(jax.tree.map(lambda ref: ref.at[0], starts), _saved(ins))
    _loop(how.save - 1, ahead)

  def back(m: Any) -> None:
    i = how.save - 1 - m
    word = ins["words"][0, i]
    pl.when(_flag(word, _ENDS))(add_edge)
    run = _chunk(how, word, ins["ids"], i)
    start = (
      _saved(ins) if how.save == 1 else jax.tree.map(lambda r: r[i], starts)
    )
    _, pull = jax.vjp(
      lambda *of: run(*of)[:2], slow(), start, load(ins["xs"], i)
    )
    by_slow, by_state, by_x = pull((_own(dstate), load(ins["dys"], i)))
    _copy(dstate, by_state)
    jax.tree.map(ref_add, dslow, by_slow)
    jax.tree.map(lambda ref, g: _store(ref, i, how, g), outs["xs"], by_x)
    pl.when(_flag(word, _EDGE))(add_edge)
    pl.when(_flag(word, _RESETS))(lambda: _clear(dstate))

  _loop(how.save, back)


def _saved(ins: dict) -> contract.State:
  return jax.tree.map(lambda ref: ref[0, 0], ins["saved"])


class _Blocks:
  """Block specs of a kernel of N chunks; in reverse for the backward one."""

  def __init__(self, how: How, chunks: int, back: bool):
    self.how = how
    groups = chunks // how.save
    self.at = (lambda j: groups - 1 - j) if back else (lambda j: j)

  def words(self) -> pl.BlockSpec:
    # Of an SMEM block the last two axes are whole.
    return pl.BlockSpec(
      (None, None, 1, self.how.save),
      lambda b, h, j: (b, self.at(j), 0, 0),
      memory_space=pltpu.SMEM,
    )

  def ids(self) -> pl.BlockSpec:
    return pl.BlockSpec(
      (1, self.how.save, 1, self.how.chunk),
      lambda b, h, j: (b, self.at(j), 0, 0),
    )

  def tokens(self, x: jax.ShapeDtypeStruct, heads: int) -> pl.BlockSpec:
    how = self.how
    if _is_row(x):
      block = (1, 1, how.save, how.heads, how.chunk)
      return pl.BlockSpec(block, lambda b, h, j: (b, h, self.at(j), 0, 0))
    width = x.shape[-1] // heads * how.heads
    block = (1, how.save * how.chunk, width)
    return pl.BlockSpec(block, lambda b, h, j: (b, self.at(j), h))

  # What stands still along the walk needs no second buffer.
  def slow(self, x: jax.ShapeDtypeStruct) -> pl.BlockSpec:
    return pl.BlockSpec(
      (self.how.heads, *x.shape[1:]),
      lambda b, h, j: (h, 0, 0),
      pipeline_mode=pl.Buffered(1),
    )

  def own(self, x: jax.ShapeDtypeStruct) -> pl.BlockSpec:
    return pl.BlockSpec(
      (1, self.how.heads, *x.shape[2:]),
      lambda b, h, j: (b, h, 0, 0),
      pipeline_mode=pl.Buffered(1),
    )

  def saved(self, x: jax.ShapeDtypeStruct) -> pl.BlockSpec:
    return pl.BlockSpec(
      (1, 1, self.how.heads, *x.shape[3:]),
      lambda b, h, j: (b, self.at(j), h, 0, 0),
    )


def _like(x: Any, *lead: int, drop: int = 0) -> Any:
  """Float32 shapes of a tree, `lead` for its first `drop` axes."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((*lead, *x.shape[drop:]), _f32), x
  )


def outputs(how: How, slow: Any, xs: Any, state: Any, ids: Any) -> Any:
  """Shapes of (y, sums) of a step, [G,C,d] and [G,1,n]."""
  G, C = how.heads, how.chunk
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, _f32)
  heads = lambda x, drop: _like(x, G, drop=drop)
  at = contract.At(
    struct(G, C, 1), None if ids is None else struct(G, 1, C),
    *[struct(G, 1, 1)] * 3, None, None,
  )  # fmt: skip
  body = lambda slow, state, x, at: how.body(
    slow, state, x, at._replace(tile=how.tile)
  )
  made = jax.eval_shape(body, heads(slow, 1), heads(state, 2), xs, at)
  return made[1:]


def _step_xs(how: How, xs: Any, heads: int) -> Any:
  """Shapes [G,C,d] of laid inputs in a step."""
  width = lambda x: 1 if _is_row(x) else x.shape[-1] // heads
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((how.heads, how.chunk, width(x)), _f32), xs
  )


def _heads_of(slow: Any, state: Any) -> int:
  return jax.tree.leaves(state)[0].shape[1]


def _call(
  kernel: Callable[..., None], how: How, name: str, grid: Any, args: dict,
  in_specs: dict, shapes: dict, out_specs: dict, scratch: Any = None,
) -> dict:  # fmt: skip
  more = {} if scratch is None else {"scratch_shapes": [scratch]}
  return pl.pallas_call(
    functools.partial(kernel, how=how),
    grid=grid,
    in_specs=[in_specs],
    out_specs=out_specs,
    out_shape=shapes,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=how.limit,
    ),
    interpret=how.interpret,
    name=how.name + name,
    **more,
  )(args)


def _forward(
  how: How, slow: Any, xs: Any, state: Any, words: jax.Array, ids: Any,
  save: bool,
) -> dict:  # fmt: skip
  """ys, state, edges, sums and saved states, laid."""
  B, N = words.shape
  H, G, M = _heads_of(slow, state), how.heads, N // how.save
  on = _Blocks(how, N, back=False)
  y, sums = outputs(how, slow, _step_xs(how, xs, H), state, ids)

  def laid(y: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if y.shape[-1] == 1:
      return jax.ShapeDtypeStruct((B, H // G, N, G, how.chunk), _f32)
    return jax.ShapeDtypeStruct((B, N * how.chunk, H * y.shape[-1]), _f32)

  tree = jax.tree.map
  shapes = dict(
    ys=tree(laid, y),
    state=_like(state),
    edges=_like(state.w),
    sums=_like(sums, B, H, drop=1),
    saved=_like(state, B, M, H, drop=2) if save else None,
  )
  args = dict(
    words=words.reshape(B, M, 1, how.save), ids=ids, slow=slow, xs=xs,
    state=state,
  )  # fmt: skip
  tokens = functools.partial(on.tokens, heads=H)
  return _call(
    _forward_kernel, how, "_fwd", (B, H // G, M), args,
    dict(
      words=on.words(), ids=None if ids is None else on.ids(),
      slow=tree(on.slow, slow), xs=tree(tokens, xs), state=tree(on.own, state),
    ),
    shapes,
    dict(
      ys=tree(tokens, shapes["ys"]),
      **{k: tree(on.own, shapes[k]) for k in ("state", "edges", "sums")},
      saved=tree(on.saved, shapes["saved"]),
    ),
  )  # fmt: skip


def _backward(
  how: How, slow: Any, xs: Any, saved: Any, words: jax.Array, ids: Any,
  dys: Any, dstate: Any, dedges: Any,
) -> dict:  # fmt: skip
  """Cotangents of slow [B,H,a,b], xs and state, laid."""
  B, N = words.shape
  H, G, M = _heads_of(slow, dstate), how.heads, N // how.save
  on = _Blocks(how, N, back=True)
  tree = jax.tree.map
  tokens = functools.partial(on.tokens, heads=H)
  shapes = dict(slow=_like(slow, B, H, drop=1), xs=xs, state=_like(dstate))
  shapes["xs"] = tree(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), xs)
  args = dict(
    words=words.reshape(B, M, 1, how.save), ids=ids, slow=slow, xs=xs,
    saved=saved, dys=dys, dstate=dstate, dedges=dedges,
  )  # fmt: skip
  scratch = None
  if how.save > 1:
    scratch = tree(
      lambda x: pltpu.VMEM((how.save, G, *x.shape[2:]), _f32), dstate
    )
  kernel = _backward_kernel
  if scratch is None:
    kernel = lambda ins, outs, how: _backward_kernel(ins, outs, None, how=how)
  return _call(
    kernel, how, "_bwd", (B, H // G, M), args,
    dict(
      words=on.words(), ids=None if ids is None else on.ids(),
      slow=tree(on.slow, slow), xs=tree(tokens, xs),
      saved=tree(on.saved, saved), dys=tree(tokens, dys),
      dstate=tree(on.own, dstate), dedges=tree(on.own, dedges),
    ),
    shapes,
    dict(
      slow=tree(on.own, shapes["slow"]), xs=tree(tokens, xs),
      state=tree(on.own, shapes["state"]),
    ),
    scratch,
  )  # fmt: skip


def _no_more(how: How, *_: Any):
  raise NotImplementedError(
    f"{how.name}: a kernel has one derivative, not two: use "
    "implementation='xla'"
  )


def _once(f: Callable[..., Any]) -> Callable[..., Any]:
  """f(how, ...) that says so where it is to be differentiated."""
  f = jax.custom_vjp(f, nondiff_argnums=(0,))
  f.defvjp(_no_more, _no_more)
  return f


_save = _once(functools.partial(_forward, save=True))
_pull = _once(_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(how: How, slow: Any, xs: Any, state: Any, words: Any, ids: Any):
  made = _forward(how, slow, xs, state, words, ids, save=False)
  return made["ys"], made["state"], made["edges"], made["sums"]


def _walk_fwd(how: How, slow: Any, xs: Any, state: Any, words: Any, ids: Any):
  made = _save(how, slow, xs, state, words, ids)
  # Named, so that a layer's remat policy may keep them: the walk then runs
  # forward once and not twice.
  ys = checkpoint_name(made["ys"], "walk_y")
  end = made["state"], made["edges"], made["sums"]
  saved = checkpoint_name(made["saved"], "walk_states")
  return (ys, *checkpoint_name(end, "walk_end")), (slow, xs, saved, words, ids)


def _walk_bwd(how: How, kept: Any, cotangents: Any):
  slow, xs, saved, words, ids = kept
  dys, dstate, dedges, _ = cotangents
  made = _pull(how, slow, xs, saved, words, ids, dys, dstate, dedges)
  dslow = jax.tree.map(lambda g: g.sum(axis=0), made["slow"])
  return dslow, made["xs"], made["state"], None, None


_walk.defvjp(_walk_fwd, _walk_bwd)


def walk(
  how: How, slow: Any, xs: Any, places: contract.Places, state: contract.State
) -> tuple[Any, contract.State, Any, jax.Array | None]:
  """`api.walk` of the rows and heads that a device holds."""
  H = _heads_of(slow, state)
  ids = places.ids
  if ids is not None:
    ids = ids.astype(_f32)[:, :, None]
  xs = jax.tree.map(lambda x: lay(x, H, how), xs)
  ys, state, edges, sums = _walk(how, slow, xs, state, words(places), ids)
  ys = jax.tree.map(unlay, ys)
  return ys, state, edges, None if sums is None else sums[:, :, 0]
