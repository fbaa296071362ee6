"""The walks of configs, as calls of `nl_jax.kernels.walk` cut to a few heads.

A config's mixer is traced by shapes alone, at its full size, and the walks
that it asks for are recorded. Cut to two rows and two steps of heads each is a
small program of its own: its kernels are those of the whole model.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.cli import named
from nl_jax import build
from nl_jax.kernels import walk
from nl_jax.kernels.walk import api, blocks, pallas, plans, products, vmem
from nl_jax.models import lm

_ROWS = 2


class Body(NamedTuple):
  """A walk of a config, and how its kernels are laid.

  Attributes:
    config: its name.
    call: at the config's size.
    how: of the kernels; None where none takes the call.
    need: VMEM of a step, about, bytes.
    heads: H.
  """

  config: str
  call: walk.Call
  how: blocks.How | None
  need: int
  heads: int

  @property
  def sizes(self) -> tuple[int, ...]:
    """K and M of the first weights of a head."""
    return plans.sizes(self.call.state)

  @property
  def chunks(self) -> int:
    """N of the config's rows."""
    return self.call.places.real.shape[1]

  @property
  def chunk(self) -> int:
    """C."""
    return self.call.places.real.shape[2]


def of_config(
  name: str, heads: int | None = None, segmented: bool = True
) -> list[Body]:
  """The walks of a config's mixer over a row of its length.

  Args:
    name: of --config; inside a mesh of the chip that is meant.
    heads: of a kernel's step; None: as `walk` chooses.
    segmented: the rows are packed.

  Raises:
    ValueError: no such config.
  """
  config = named.load_config(name)
  with config.unlocked():
    config.train.dtype = "bfloat16"
  net = build.model(build.resolve(config))
  tokens = config.data.sequence_length
  with walk.recorded() as calls:
    jax.eval_shape(functools.partial(_mix, net, tokens, segmented))
  # A walk that is traced again, as under `jax.checkpoint`, is one.
  calls = list({_key(call): call for call in calls}.values())
  return [_body(name, call, heads) for call in calls]


def _key(call: walk.Call) -> str:
  arrays = (call.slow, call.xs, call.places, call.state)
  return f"{call.name} {jax.tree.leaves(arrays)}"


def _mix(net: lm.LanguageModel, tokens: int, segmented: bool) -> Any:
  """A layer's mixer at the start of packed rows."""
  net = getattr(net, "base", net)
  blocks = net.init(jax.random.key(0))["blocks"]
  blocks = net.laid(blocks)
  layer = jax.tree.map(lambda x: x[0], blocks)
  x = jnp.zeros((_ROWS, tokens, net.width), net.dtype)
  x = net.enter(x)
  ids = jnp.ones((_ROWS, tokens), jnp.int32) if segmented else None
  return net.mix(layer, x, None, ids)


def _body(name: str, call: walk.Call, heads: int | None) -> Body:
  slow, xs, places, state = call.slow, call.xs, call.places, call.state
  H = api.heads_of(slow, state)
  if call.implementation != "pallas_tpu":
    why = call.reason or f"the mixer asks for {call.asked!r}"
    return Body(name, call._replace(reason=why), None, 0, H)
  kernel = plans.Kernel(call.body, call.policy, call.name, heads)
  how, need = plans.plan(kernel, slow, xs, places, state)
  return Body(name, call, how, need, H)


def step_heads(body: Body) -> list[int]:
  """Heads that a step of the body's kernels may have."""
  call = body.call
  how = body.how
  whole = blocks.How(
    how.body, products.Tile(how.tile.policy, fused=True), how.chunk,
    body.heads, 1, how.name, how.limit, how.interpret,
  )  # fmt: skip
  return plans.step_heads(whole, call.slow, call.xs, call.places, call.state)


def equations(body: Body) -> core.Jaxpr:
  """The chunk function with its derivative, one head, each product once."""
  call, how = body.call, body.how
  one = blocks.How(
    how.body, products.Tile(products.F32, fused=True), how.chunk, 1, 1,
    how.name, how.limit, how.interpret,
  )  # fmt: skip
  step = pallas.step(one, call.slow, call.xs, call.state, call.places.ids)
  return pallas.derivative(one, step)


def digest(body: Body) -> str:
  """The same for walks that compute and read the same, of whatever config."""
  call = body.call
  if body.how is None:
    text = _key(call)
  else:
    types = [x.dtype for x in jax.tree.leaves(call.xs)]
    text = f"{equations(body)} {body.how.heads} {call.policy} {types}"
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def products_flops(body: Body) -> tuple[float, float]:
  """Operations of the products of a chunk and head: (F, G).

  Each product counts once, whatever passes the policy makes of it.
  """
  call, how = body.call, body.how
  one = blocks.How(
    how.body, products.Tile(products.F32, fused=True), how.chunk, 1, 1,
    how.name, how.limit, how.interpret,
  )  # fmt: skip
  step = pallas.step(one, call.slow, call.xs, call.state, call.places.ids)
  return flops(pallas.forward(one, step)), flops(pallas.derivative(one, step))


def flops(jaxpr: core.Jaxpr) -> float:
  """2 x outputs x terms of every product of equations and those within."""
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (axes, _), _ = equation.params["dimension_numbers"]
      lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
      total += 2.0 * math.prod(out) * math.prod(lhs[a] for a in axes)
    total += sum(map(flops, vmem.inner(equation)))
  return total


class Program(NamedTuple):
  """A walk of a few heads, as functions and shapes of what they take.

  Attributes:
    forward: (slow, xs, state, places) -> (ys, state, edges).
    backward: the same and the cotangents of those -> of slow, xs, state.
    inputs: of `forward`.
    cotangents: of what it returns.
    rows, heads, chunks: of the cut.
  """

  forward: Callable[..., Any]
  backward: Callable[..., Any]
  inputs: tuple[Any, ...]
  cotangents: Any
  rows: int
  heads: int
  chunks: int


def program(
  body: Body, implementation: str, mesh: jax.sharding.Mesh, groups: int = 2
) -> Program:
  """The walk of a body cut to `_ROWS` rows and `groups` steps of heads.

  Args:
    body: whose kernels there are.
    implementation: of the walk; the XLA form is cut to a row of eight heads.
    mesh: of one device, the chip that is meant.
    groups: steps of heads of a kernel, as many as there are.
  """
  call, how = body.call, body.how
  fused = implementation != "xla"
  step = how.heads if how else body.heads
  B = _ROWS if fused else 1
  H = min(step * groups if fused else 8, body.heads)
  N = 2 * how.save if fused else 2 * call.group
  here = NamedSharding(mesh, P())

  def cut(tree: Any, shape: Callable[[tuple[int, ...]], tuple]) -> Any:
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(shape(x.shape), x.dtype, sharding=here),
      tree,
    )

  C = body.chunk
  slow = cut(call.slow, lambda s: (H, *s[1:]))
  xs = cut(call.xs, lambda s: (B, N * C, s[2] // body.heads * H))
  state = cut(call.state, lambda s: (B, H, *s[2:]))
  places = cut(call.places, lambda s: (B, N, *s[2:]))

  def forward(slow: Any, xs: Any, state: Any, places: Any) -> Any:
    return walk.walk(
      call.body, slow, xs, places,
      state=state, group=call.group, name=call.name, policy=call.policy,
      chunk_free=call.chunk_free, implementation=implementation,
      heads=how.heads if fused else None, save=how.save if fused else None,
    )[:3]  # fmt: skip

  def backward(slow: Any, xs: Any, state: Any, places: Any, of: Any) -> Any:
    run = lambda slow, xs, state: forward(slow, xs, state, places)
    return jax.vjp(run, slow, xs, state)[1](of)

  inputs = (slow, xs, state, places)
  cotangents = jax.eval_shape(forward, *inputs)
  cotangents = cut(cotangents, lambda s: s)
  return Program(forward, backward, inputs, cotangents, B, H, N)


class Moved(NamedTuple):
  """Bytes of main memory of a kernel, exactly, from its blocks.

  Attributes:
    along: of a head's chunk, what is read and written at each step.
    still: of a head and row, once a walk.
  """

  along: float
  still: float

  def of_chunk(self, chunks: int) -> float:
    """Bytes a head and chunk in a walk of so many chunks."""
    return self.along + self.still / chunks


def moved(body: Body, run: Callable[..., Any], args: tuple) -> dict[str, Moved]:
  """What each kernel of a program moves, by its name."""
  jaxpr = jax.make_jaxpr(run)(*args).jaxpr
  G, save = body.how.heads, body.how.save
  found = {}
  for equation in _kernels(jaxpr):
    along = still = 0.0
    for mapping in equation.params["grid_mapping"].block_mappings:
      size = _block_bytes(mapping)
      if _follows(mapping.index_map_jaxpr.jaxpr):
        along += size / (G * save)
      else:
        still += size / G
    name = equation.params["name"]
    found[name] = Moved(along, still)
  return found


def _kernels(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
    else:
      for inner in vmem.inner(equation):
        yield from _kernels(inner)


def _follows(index_map: core.Jaxpr) -> bool:
  """Whether a block is another one at the next step of the walk."""
  moving = {index_map.invars[2]}
  for equation in index_map.eqns:
    # Literals cannot be looked up.
    if any(x in moving for x in equation.invars if isinstance(x, core.Var)):
      moving.update(equation.outvars)
  return any(x in moving for x in index_map.outvars if isinstance(x, core.Var))


def _block_bytes(mapping: Any) -> int:
  size = lambda x: x if isinstance(x, int) else getattr(x, "block_size", 1)
  dims = [size(x) for x in mapping.block_shape]
  return math.prod(dims) * jnp.dtype(mapping.array_aval.dtype).itemsize
