"""The walk of a chunk function over the chunks of a call (see `contract`).

`xla` runs anywhere, takes any call and has derivatives of any order;
`pallas_tpu` keeps the fast weights in VMEM and has one derivative;
`pallas_interpret` is the same kernels on any platform, for tests. All call the
same chunk function.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nl_jax.kernels import placement
from nl_jax.kernels.walk import (
  affine,
  contract,
  pallas,
  plans,
  products,
  sequence,
  vmem,
  xla,
)

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_interpret")
_calls: list[list["Call"]] = []  # Of each `recorded` that is open.


class Call(NamedTuple):
  """A call of `walk` as `recorded` keeps it: arrays are shapes.

  Attributes:
    name: of the kernels.
    body: the chunk function.
    slow, xs, places, state: see `walk`; those of all devices.
    group, policy, chunk_free: see `walk`; what the policy was in the end.
    asked, implementation: what was named, and what ran it.
    reason: why no kernel of a TPU takes the call, or None.
    affine: devices that split tokens do not wait for each other, see `walk`.
  """

  name: str
  body: contract.Body
  slow: Any
  xs: Any
  places: contract.Places
  state: contract.State
  group: int
  policy: products.Policy
  chunk_free: bool
  asked: str | None
  implementation: str
  reason: str | None
  affine: bool


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
  """A list that every walk traced within is added to.

  What a model's walks are is then known without running it, as from
  `jax.eval_shape`.
  """
  calls: list[Call] = []
  _calls.append(calls)
  try:
    yield calls
  finally:
    _calls.remove(calls)


def walk(
  body: contract.Body,
  slow: Any,
  xs: Any,
  places: contract.Places,
  *,
  state: contract.State,
  anchor: Any = None,
  group: int = 4,
  save: int | None = None,
  heads: int | None = None,
  policy: products.Policy | str | None = None,
  rate: float = 1.0,
  implementation: str | None = None,
  spec: P | None = None,
  name: str = "walk",
  chunk_free: bool = False,
  columns: affine.Columns | None = None,
) -> tuple[Any, contract.State, Any, jax.Array | None]:
  """Runs `body` over N chunks of C tokens.

  Of each chunk: fast weights are 0 where a document begins with it, inputs
  are 0 where no token is, then comes the body.

  Args:
    body: the chunk function, see `contract`.
    slow: leaves [H,a,b], the slow parameters that it reads.
    xs: leaves [B,N*C,H*d], heads packed; cast to the state's type inside.
    places: where the tokens stand.
    state: fast weights before the call.
    anchor: tree like `state.w`, the weights at the last chunk edge; None where
      every row stands at an edge.
    group: chunks between two states that the XLA form keeps for the backward
      pass; where it is more than 1 the states between are made again too.
    save: chunks between the saved states of a kernel; those between are made
      again. None: what `tiles.json` has, or as few as let all states that are
      kept at once (see `kept`) stay within `plans.KEPT_BYTES`. Of both the next
      smaller divisor of N is taken.
    heads: of a kernel's step. None: `tiles.json`, or as VMEM allows.
    policy: of products, or its name. None: where an input is bfloat16 and the
      platform is not a CPU "lean", or "lean2" with a rate above 1; else "f32".
    rate: the largest rate at which a token erases: beyond 1 the systems are
      worse conditioned.
    implementation: one of `IMPLEMENTATIONS`. None: the kernel on a TPU where
      `supports` has nothing against it, else "xla".
    spec: mesh axes of [B, T, H*d]; a kernel runs on each device's own rows
      and heads.
    name: of the kernels.
    chunk_free: the chunk is not part of the function, and documents may begin
      inside one in a kernel as well.
    columns: of a walk that is affine in its state, see `affine`: where the
      tokens of a row are split over devices, these then do not wait for each
      other. None: they do, see `sequence`.

  Returns:
    (ys leaves [B,N*C,h*d] with the heads h that the body returned, state, the
    weights at the last chunk edge, sums float32 [B,H,n] or None). Sums have no
    gradient.

  Raises:
    ValueError: an unknown name, inputs that do not fit each other, or what
      `supports` says of an implementation that was named.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"walk: no implementation {implementation!r}; there are "
      f"{', '.join(IMPLEMENTATIONS)}"
    )
  H = _check(slow, xs, places, state)
  tile = products.Tile(_policy(policy, xs, rate))
  asked = implementation
  why = functools.partial(
    supports, slow=slow, xs=xs, places=places, state=state, anchor=anchor,
    heads=heads, spec=spec, chunk_free=chunk_free,
  )  # fmt: skip
  if implementation is None:
    on_tpu = placement.platform() == "tpu" and why("pallas_tpu") is None
    implementation = "pallas_tpu" if on_tpu else "xla"
  elif (reason := why(implementation)) is not None:
    raise ValueError(f"{name} cannot run as {implementation}: {reason}")
  if _calls:
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
      (slow, xs, places, state),
    )
    inputs = dict(zip(("slow", "xs", "places", "state"), shapes))
    call = Call(
      name=name, body=body, group=group, policy=tile.policy,
      chunk_free=chunk_free, asked=asked, implementation=implementation,
      reason=why("pallas_tpu"), affine=columns is not None, **inputs,
    )  # fmt: skip
    for calls in _calls:
      calls.append(call)
  mesh = jax.sharding.get_abstract_mesh()
  pieces = sequence.parts(mesh, spec)[1]
  split = pieces > 1 and anchor is None and not places.real.shape[1] % pieces
  interpret = implementation == "pallas_interpret"

  def of(body: contract.Body, name: str) -> sequence.Run:
    if implementation == "xla":
      return functools.partial(
        _xla, body, heads=H, group=group, tile=tile, name=name
      )
    kernel = plans.Kernel(body, tile.policy, name, heads, save, interpret)
    return functools.partial(_fused, kernel)

  run = of(body, name)
  if split:
    how: Any = dict(mesh=mesh, spec=spec, manual=implementation != "xla")
    if columns is None:
      return sequence.walk(run, slow, xs, places, state, **how)
    narrow = of(columns.body, f"{name}_columns")
    return affine.walk(run, narrow, columns, slow, xs, places, state, **how)
  if implementation == "xla":
    return run(slow, xs, places, state, anchor)
  if spec is None or mesh.empty or mesh.size == 1:
    return run(slow, xs, places, state)
  rows, _, across = sequence.axes(mesh, spec)
  own = P(rows, across)
  shard = jax.shard_map(
    run,
    in_specs=(P(across), P(rows, None, across), P(rows), own),
    out_specs=(P(rows, None, across), own, own, own),
    axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
    # A kernel does not say over which axes its outputs vary.
    check_vma=False,
  )
  return shard(slow, xs, places, state)


def _xla(
  body: contract.Body,
  slow: Any,
  xs: Any,
  places: contract.Places,
  state: contract.State,
  anchor: Any = None,
  **how: Any,
) -> tuple[Any, contract.State, Any, jax.Array | None]:
  """`xla.walk`, arrays in the order of the kernels."""
  return xla.walk(body, slow, xs, places, state=state, anchor=anchor, **how)


def _fused(
  kernel: plans.Kernel,
  slow: Any,
  xs: Any,
  places: contract.Places,
  state: contract.State,
) -> tuple[Any, contract.State, Any, jax.Array | None]:
  """The kernels on the rows and heads of a device."""
  how, need = plans.plan(kernel, slow, xs, places, state)
  if need > how.limit:
    MiB = lambda n: f"{n / 2**20:.0f} MiB"
    raise ValueError(
      f"{how.name}: a step of {how.heads} heads needs about {MiB(need)} of "
      f"VMEM, a kernel on {vmem.chip()[0]} has {MiB(how.limit)}: set heads=… "
      "or implementation='xla'"
    )
  return pallas.walk(how, slow, xs, places, state)


def supports(
  implementation: str,
  slow: Any,
  xs: Any,
  places: contract.Places,
  *,
  state: contract.State,
  anchor: Any = None,
  heads: int | None = None,
  spec: P | None = None,
  chunk_free: bool = False,
) -> str | None:
  """Why an implementation cannot take a call, or None where it can.

  Args: as `walk`; of arrays only shapes and types are read.
  """
  if implementation == "xla":
    return None
  C = places.real.shape[-1]
  H = heads_of(slow, state)
  mesh = jax.sharding.get_abstract_mesh()
  parts = sequence.parts(mesh, spec)
  if implementation == "pallas_tpu":
    if (platform := placement.platform()) != "tpu":
      return (
        f"it needs a TPU, got the platform {platform!r}; "
        "'pallas_interpret' runs anywhere"
      )
    if mesh.empty and jax.device_count() > 1:
      return "over several devices it needs a mesh: use jax.set_mesh"
    if mesh.size > 1 and spec is None:
      return "over several devices it needs spec=, the mesh axes of xs"
  if anchor is not None:
    return (
      "a row may stand inside a chunk (anchor is given), and kernels start at "
      "chunk edges; 'xla' takes it"
    )
  if C == 1:
    return "a single token is not work for a kernel; 'xla' takes it"
  if C & (C - 1) or not 8 <= C <= 128:
    return f"kernels take chunks of 8, 16, 32, 64 or 128 tokens, got {C}"
  if places.ids is not None and not chunk_free:
    return (
      "a document may begin inside a chunk (ids are given), and this chunk "
      "function takes that only in 'xla'; pack documents at chunk edges"
    )
  for kind, tree, axes in (
    ("slow", slow, "[H, a, b]"), ("state", state, "[B, H, a, b]"),
  ):  # fmt: skip
    rank = axes.count(",") + 1
    for x in jax.tree.leaves(tree):
      if x.dtype != jnp.float32:
        return f"kernels take float32 {kind}, got {x.dtype}; 'xla' takes it"
      if x.ndim != rank or x.shape[rank - 3] != H:
        return (
          f"leaves of {kind} are {axes} with H={H} in a kernel, got the shape "
          f"{x.shape}; 'xla' takes it"
        )
  if any(x.dtype.itemsize == 8 for x in jax.tree.leaves(xs)):
    return "kernels take float32 and bfloat16 inputs; 'xla' takes float64"
  if (count := places.real.shape[1]) % parts[1]:
    return (
      f"{count} chunks of a row do not divide over {parts[1]} devices of the "
      "mesh"
    )
  for what, size, part in (
    ("rows", places.real.shape[0], parts[0]), ("heads", H, parts[2]),
  ):  # fmt: skip
    if size % part:
      return f"{size} {what} do not divide over {part} devices of the mesh"
  own = H // parts[2]
  may = plans.groups(own, [x.shape[-1] // H for x in jax.tree.leaves(xs)])
  if heads is not None and heads not in may:
    return plans.no_group(heads, own, may)
  return None


def heads_of(slow: Any, state: contract.State) -> int:
  """H: the first axis of slow parameters, or the second of fast weights."""
  leaves = jax.tree.leaves(slow)
  return leaves[0].shape[0] if leaves else jax.tree.leaves(state.w)[0].shape[1]


def _check(
  slow: Any, xs: Any, places: contract.Places, state: contract.State
) -> int:
  """H, of a call whose arrays fit each other."""
  H = heads_of(slow, state)
  B, N, C = places.real.shape
  for x in jax.tree.leaves(xs):
    if x.ndim != 3 or x.shape[:2] != (B, N * C) or x.shape[2] % H:
      raise ValueError(
        f"walk: an input is [B, N*C, H*d] with B={B}, N={N}, C={C}, H={H}, "
        f"got the shape {x.shape}"
      )
  for x in jax.tree.leaves(state):
    if x.shape[:1] != (B,):
      raise ValueError(f"walk: {B} rows of inputs, but a state {x.shape}")
  return H


def _policy(
  policy: products.Policy | str | None, xs: Any, rate: float
) -> products.Policy:
  if policy is None:
    low = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(xs))
    return default_policy(jnp.bfloat16 if low else jnp.float32, rate)
  if isinstance(policy, products.Policy):
    return policy
  if policy not in products.POLICIES:
    raise ValueError(
      f"walk: no policy {policy!r}; there are {', '.join(products.POLICIES)}"
    )
  return products.POLICIES[policy]


def default_policy(dtype: jnp.dtype, rate: float = 1.0) -> products.Policy:
  """That of a model's activations, for the platform that the program is for.

  Args:
    dtype: of the activations.
    rate: the largest rate at which a token erases.
  """
  if dtype != jnp.bfloat16 or placement.platform() == "cpu":
    return products.F32
  return products.LEAN if rate <= 1 else products.LEAN2
