"""The walk over chunks as two TPU kernels, made from any chunk function.

Grid (rows, head groups, groups of `save` chunks), the last in order: the state
of a head group stays in VMEM over the whole walk. The forward kernel writes
the state at the start of each group of chunks. The backward kernel takes the
groups in reverse, makes the states within one again, and differentiates the
chunk function itself by `jax.vjp`, traced inside the kernel; the cotangents of
the state and of slow parameters stay in VMEM. Outputs that stand still along
the walk are its accumulators.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core

from nl_jax.kernels.walk import blocks, contract, products
from nl_jax.kernels.walk.blocks import How

_f32 = jnp.float32
_map = jax.tree.map

# A word a chunk: its real tokens are lo <= t < hi, lo in bits 0 to 7, hi in 8
# to 15; then flags. EDGE: the last chunk edge of the call is where this chunk
# begins; ENDS: it is where this chunk ends.
_RESETS, _CLOSES, _FIRST, _EDGE, _ENDS = range(16, 21)


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
  # Where the call does not end at an edge, the last one is the start of the
  # last chunk that stays open, leaving out those that hold no token and follow
  # an open one. If a document began inside that chunk, the edge is 0.
  closed = jnp.concatenate([~zero[:, :1], closes[:, :-1]], axis=1)
  stays = ~closes & (some | closed | resets)
  last = N - 1 - jnp.argmax(stays[:, ::-1], -1)
  edge = stays & (jnp.arange(N)[None] == last[:, None]) & ~closes[:, -1:]
  if places.ids is not None:
    edge &= (places.ids[..., -1] == 0) | ~some
  ends = closes & (jnp.arange(N) == N - 1)[None]
  flags = {
    _RESETS: resets, _CLOSES: closes, _FIRST: first, _EDGE: edge, _ENDS: ends,
  }  # fmt: skip
  out = jnp.where(some, low | high << 8, 0)
  for bit, flag in flags.items():
    out |= flag.astype(jnp.int32) << bit
  return out


def _flag(word: jax.Array, bit: int) -> jax.Array:
  return ((word >> bit) & 1) == 1


def _chunk(how: How, word: jax.Array, ids: Any, i: Any) -> Callable[..., Any]:
  """(slow, state, x) -> (state, y, sums) of a step's chunk i."""
  G, C = how.heads, how.chunk
  low, high = word & 255, (word >> 8) & 255

  def inside(shape: tuple[int, ...]) -> jax.Array:
    # At the full shape: Mosaic does not broadcast small masks.
    t = blocks.iota(shape, 1)
    return (t >= low) & (t < high)

  number = lambda bit: jnp.full((G, 1, 1), ((word >> bit) & 1).astype(_f32))
  at = contract.At(
    real=jnp.where(inside((G, C, 1)), 1.0, 0.0),
    ids=None if ids is None else jnp.broadcast_to(ids[0, i][None], (G, 1, C)),
    resets=number(_RESETS),
    closes=number(_CLOSES),
    first=number(_FIRST),
    anchor=None,
    tile=how.tile,
  )

  def run(slow: Any, state: contract.State, x: Any) -> Any:
    x = _map(lambda x: jnp.where(inside(x.shape), x, 0.0), x)
    return contract.check(how.body(slow, state, x, at), state, at, how.name)

  return run


# Of outputs, last states and saved states, for policies of `jax.checkpoint`.
NAMES = ("walk_y", "walk_end", "walk_states")


def _loop(n: int, step: Callable[[Any], None]) -> None:
  if n == 1:
    step(0)
  else:
    jax.lax.fori_loop(0, n, lambda i, _: step(i), None)


def _forward_kernel(ins: dict, outs: dict, *, how: How) -> None:
  state, edges = outs["state"], outs["edges"]

  @pl.when(pl.program_id(2) == 0)
  def _():
    blocks.move(state, ins["state"])
    blocks.clear((edges, outs["sums"]))

  keep_edge = lambda: blocks.move(edges, state.w)

  def step(i: Any) -> None:
    word = ins["words"][0, i]
    pl.when(_flag(word, _RESETS))(lambda: blocks.clear(state))
    if outs["saved"] is not None:

      @pl.when(i == 0)
      def _():
        blocks.copy(outs["saved"], blocks.own(state))

    pl.when(_flag(word, _EDGE))(keep_edge)
    slow = _map(lambda ref: ref[...], ins["slow"])
    x = _map(lambda ref: blocks.load(ref, i, how), ins["xs"])
    run = _chunk(how, word, ins["ids"], i)
    new, y, sums = run(slow, blocks.own(state), x)
    blocks.copy(state, new)
    _map(lambda ref, y: blocks.store(ref, i, how, y), outs["ys"], y)
    if sums is not None:
      outs["sums"][0] += sums.astype(_f32)
    pl.when(_flag(word, _ENDS))(keep_edge)

  _loop(how.save, step)


def _backward_kernel(ins: dict, outs: dict, *starts: Any, how: How) -> None:
  """`starts`: scratch [g,G,a,b] for the states of a step, where g > 1."""
  dstate, dslow = outs["state"], outs["slow"]
  load = lambda refs, i: _map(lambda ref: blocks.load(ref, i, how), refs)
  slow = lambda: _map(lambda ref: ref[...], ins["slow"])
  saved = lambda: _map(lambda ref: ref[0, 0].astype(_f32), ins["saved"])
  start = lambda i: _map(lambda ref: ref[i], starts[0]) if starts else saved()
  chunk = lambda i: _chunk(how, ins["words"][0, i], ins["ids"], i)

  def add(refs: Any, values: Any) -> None:
    for ref, value in zip(jax.tree.leaves(refs), jax.tree.leaves(values)):
      ref[0] += value

  add_edge = lambda: blocks.add(dstate.w, ins["dedges"])

  @pl.when(pl.program_id(2) == 0)
  def _():
    blocks.move(dstate, ins["dstate"])
    blocks.clear(dslow)

  def ahead(i: Any) -> None:
    reset = _flag(ins["words"][0, i + 1], _RESETS)
    then = _map(lambda ref: ref.at[i + 1], starts[0])
    pl.when(reset)(lambda: blocks.clear(then))

    @pl.when(~reset)
    def _():
      new, _, _ = chunk(i)(slow(), start(i), load(ins["xs"], i))
      blocks.copy(then, new)

  if starts:
    blocks.copy(_map(lambda ref: ref.at[0], starts[0]), saved())
    _loop(how.save - 1, ahead)

  def back(m: Any) -> None:
    i = how.save - 1 - m
    word = ins["words"][0, i]
    pl.when(_flag(word, _ENDS))(add_edge)
    _, pull = jax.vjp(
      lambda *of: chunk(i)(*of)[:2], slow(), start(i), load(ins["xs"], i)
    )
    by = pull((blocks.own(dstate), load(ins["dys"], i)))
    add(dslow, by[0])
    blocks.copy(dstate, by[1])
    _map(lambda ref, g: blocks.store(ref, i, how, g), outs["xs"], by[2])
    pl.when(_flag(word, _EDGE))(add_edge)
    pl.when(_flag(word, _RESETS))(lambda: blocks.clear(dstate))

  _loop(how.save, back)


class Step(NamedTuple):
  """Shapes of what a step's chunk takes and makes.

  Attributes:
    slow, state: leaves [G,a,b]; x, y: [G,C,d]; sums: [G,1,n] or None.
    ids: [1,1,1,C] or None.
  """

  slow: Any
  state: contract.State
  x: Any
  ids: jax.ShapeDtypeStruct | None
  y: Any = None
  sums: jax.ShapeDtypeStruct | None = None


_WORD = jax.ShapeDtypeStruct((), jnp.int32)


def _like(tree: Any, *lead: int, drop: int = 0) -> Any:
  """Float32 shapes of a tree, `lead` for its first `drop` axes."""
  return _map(
    lambda x: jax.ShapeDtypeStruct((*lead, *x.shape[drop:]), _f32), tree
  )


def step(how: How, slow: Any, xs: Any, state: contract.State, ids: Any) -> Step:
  """Of a call's arrays, of which only shapes are read.

  Raises:
    ValueError: the chunk function makes what `contract.check` does not take, or
      outputs without an axis of the step's heads.
  """
  G, C, H = how.heads, how.chunk, heads_of(state)
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, _f32)
  made = Step(
    slow=_like(slow, G, drop=1),
    state=_like(state, G, drop=2),
    x=_map(lambda x: struct(G, C, x.shape[-1] // H), xs),
    ids=None if ids is None else struct(1, 1, 1, C),
  )

  def run(word: Any, slow: Any, state: Any, x: Any, ids: Any) -> Any:
    return _chunk(how, word, ids, 0)(slow, state, x)

  _, y, sums = jax.eval_shape(run, _WORD, *made[:4])
  shapes = lambda tree: _map(lambda x: tuple(x.shape), tree)
  if any(x.shape[:-1] != (G, C) for x in jax.tree.leaves(y)):
    raise ValueError(
      f"{how.name}: in a kernel the outputs of a chunk function are "
      f"[{G}, {C}, d], got {shapes(y)}; implementation='xla' takes others"
    )
  return made._replace(y=y, sums=sums)


def forward(how: How, step: Step) -> core.Jaxpr:
  """A chunk's equations, as in the forward kernel."""

  def run(word: Any, slow: Any, state: Any, x: Any, ids: Any) -> Any:
    return _chunk(how, word, ids, 0)(slow, state, x)

  return jax.make_jaxpr(run)(_WORD, *step[:4]).jaxpr


def derivative(how: How, step: Step) -> core.Jaxpr:
  """A chunk's equations with their derivative, as in the backward kernel."""

  def both(word: Any, slow: Any, state: Any, x: Any, ids: Any, g: Any) -> Any:
    run = _chunk(how, word, ids, 0)
    return jax.vjp(lambda *of: run(*of)[:2], slow, state, x)[1](g)

  return jax.make_jaxpr(both)(_WORD, *step[:4], (step.state, step.y)).jaxpr


def heads_of(state: contract.State) -> int:
  """H, from leaves [B,H,a,b]."""
  return jax.tree.leaves(state)[0].shape[1]


_KINDS = dict(
  words="words", ids="ids", slow="slow", xs="tokens", ys="tokens",
  dys="tokens", state="own", dstate="own", edges="own", dedges="own",
  sums="own", saved="saved",
)  # fmt: skip


def _call(
  kernel: Callable[..., None],
  how: How,
  ins: dict[str, Any],
  outs: dict[str, Any],
  scratch: list[Any],
  back: bool,
) -> dict[str, Any]:
  """Runs a kernel on arrays by name, see `_KINDS`; words are [B,N]."""
  B, N = ins["words"].shape
  H = heads_of(outs["state"])
  groups = N // how.save
  specs = blocks.Specs(how, H, groups, back)
  ins = ins | {"words": ins["words"].reshape(B, groups, 1, how.save)}
  # Cotangents of slow parameters are each row's own.
  kinds = _KINDS | ({"slow": "own"} if back else {})
  return pl.pallas_call(
    functools.partial(kernel, how=how),
    grid=(B, H // how.heads, groups),
    in_specs=[specs.of(_KINDS, ins)],
    out_specs=specs.of(kinds, outs),
    out_shape=outs,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=how.limit,
    ),
    interpret=how.interpret,
    name=how.name + ("_bwd" if back else "_fwd"),
  )(ins)


def _saved(how: How, state: contract.State, groups: int) -> contract.State:
  """Shapes of saved states [B,N/g,H,a,b].

  A layer that keeps them writes and reads them twice more, as a scan over
  layers stacks them. Half as long, they are as exact as what is read of them:
  in one pass.
  """

  def one(x: jax.Array) -> jax.ShapeDtypeStruct:
    B, H, a, b = x.shape
    return jax.ShapeDtypeStruct(
      (B, groups, H, a, b), saved_dtype(how.tile.policy, x)
    )

  return _map(one, state)


def saved_dtype(policy: products.Policy, x: Any) -> jnp.dtype:
  """Of a leaf [..., a, b] of the state in main memory.

  Args:
    policy: of the walk's products.
    x: the leaf, or its shape.
  """
  tiles = x.shape[-2] % 16 == 0 and x.shape[-1] % 128 == 0
  return jnp.bfloat16 if policy.read == "x1" and tiles else _f32


def _forward(
  how: How,
  slow: Any,
  xs: Any,
  state: contract.State,
  words: jax.Array,
  ids: jax.Array | None,
  save: bool = False,
) -> tuple[tuple[Any, contract.State, Any, jax.Array | None], Any]:
  """((ys, state, edges, sums [B,H,1,n]), states [B,N/g,H,a,b])."""
  (B, N), H = words.shape, heads_of(state)
  made = step(how, slow, xs, state, ids)
  lay = lambda x: blocks.lay(x, H, how)
  whole = lambda y: jax.ShapeDtypeStruct(
    (B, N * how.chunk, H * y.shape[-1]), _f32
  )
  ins = dict(words=words, ids=ids, slow=slow, xs=_map(lay, xs), state=state)
  outs = dict(
    ys=_map(lambda y: jax.eval_shape(lay, whole(y)), made.y),
    state=_like(state),
    edges=_like(state.w),
    sums=_like(made.sums, B, H, drop=1),
    saved=_saved(how, state, N // how.save) if save else None,
  )
  outs = _call(_forward_kernel, how, ins, outs, [], back=False)
  ys = _map(blocks.unlay, outs["ys"])
  return (ys, outs["state"], outs["edges"], outs["sums"]), outs["saved"]


def _backward(
  how: How,
  slow: Any,
  xs: Any,
  saved: contract.State,
  words: jax.Array,
  ids: jax.Array | None,
  dys: Any,
  dstate: contract.State,
  dedges: Any,
) -> tuple[Any, Any, contract.State]:
  """Cotangents of slow, summed over rows, of xs and of the first state."""
  B, H = words.shape[0], heads_of(dstate)
  xs, dys = _map(lambda x: blocks.lay(x, H, how), (xs, dys))
  ins = dict(
    words=words, ids=ids, slow=slow, xs=xs, saved=saved, dys=dys,
    dstate=dstate, dedges=dedges,
  )  # fmt: skip
  outs = dict(
    slow=_like(slow, B, H, drop=1),
    xs=_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), xs),
    state=_like(dstate),
  )
  starts = lambda x: pltpu.VMEM((how.save, how.heads, *x.shape[2:]), _f32)
  scratch = [_map(starts, dstate)] if how.save > 1 else []
  outs = _call(_backward_kernel, how, ins, outs, scratch, back=True)
  dslow = _map(lambda g: g.sum(axis=0), outs["slow"])
  return dslow, _map(blocks.unlay, outs["xs"]), outs["state"]


def _no_more(how: How, *_: Any) -> NoReturn:
  raise NotImplementedError(
    f"{how.name}: a kernel has one derivative, not two: use "
    "implementation='xla'"
  )


def _once(f: Callable[..., Any]) -> Callable[..., Any]:
  """f(how, ...), which says so where it would be differentiated."""
  f = jax.custom_vjp(f, nondiff_argnums=(0,))
  f.defvjp(_no_more, _no_more)
  return f


_saving = _once(functools.partial(_forward, save=True))
_pull = _once(_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(
  how: How, slow: Any, xs: Any, state: contract.State, words: Any, ids: Any
) -> tuple[Any, contract.State, Any, jax.Array | None]:
  return _forward(how, slow, xs, state, words, ids)[0]


def _walk_fwd(
  how: How, slow: Any, xs: Any, state: contract.State, words: Any, ids: Any
) -> tuple[Any, Any]:
  (ys, *end), saved = _saving(how, slow, xs, state, words, ids)
  # Named, so that a layer's remat policy may keep them: the walk then runs
  # forward once and not twice.
  ys, end, saved = map(checkpoint_name, (ys, end, saved), NAMES)
  return (ys, *end), (slow, xs, saved, words, ids)


def _walk_bwd(how: How, kept: Any, cotangents: Any) -> tuple[Any, ...]:
  return *_pull(how, *kept, *cotangents[:3]), None, None


_walk.defvjp(_walk_fwd, _walk_bwd)


def walk(
  how: How, slow: Any, xs: Any, places: contract.Places, state: contract.State
) -> tuple[Any, contract.State, Any, jax.Array | None]:
  """`api.walk` of the rows and heads that a device holds."""
  ids = places.ids
  if ids is not None:
    ids = ids.astype(_f32)[:, :, None]
  ys, state, edges, sums = _walk(how, slow, xs, state, words(places), ids)
  return ys, state, edges, None if sums is None else sums[:, :, 0]
