"""The mesh, the logical axes, and the one table that maps them.

Model code names logical axes and never a mesh axis. A parameter's axes are in
the table of its model, a state's in its name. Fast weights are laid out by
sequence and head, so that inner loops need no collective.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nl_jax import fields

Tree = Any
Axes = Mapping[str, tuple[str | None, ...]]  # Logical names by path.

AXES = ("replica", "fsdp", "sequence", "tensor")
_SIZE = fields.Whole(1, also=(-1,))

LOGICAL = {
  "batch": ("replica", "fsdp"),
  "length": "sequence",
  "tokens": ("sequence", "tensor"),  # Where each goes its own way.
  "act_embed": None,  # Model width of activations, norms and convolutions.
  "embed": "fsdp",  # Model width of matrices.
  "heads": "tensor",
  "head_dim": None,
  "mem_in": None,
  "start_in": "fsdp",  # Of learned starts of memories, where it divides.
  "mem_out": None,
  "mlp": "tensor",
  "vocab": "tensor",
  "layer": None,
  "level": None,
  "chunk": None,
}

# Axes of a state after `batch`, by the letters that end its name: inputs_Bx3xE.
_LETTERS = {
  **{"S": "length", "C": "chunk", "3": "chunk", "D": "act_embed"},
  **dict.fromkeys("EHI", "heads"),
  **{"K": "head_dim", "V": "mem_out", "N": "mem_in"},
}
# Of other leaves of a language model's state, the first that fits path and
# rank: axes after `layer`, in layers/, and `batch`.
_FEED_FORWARD = r"levels/\w+/(params|start|gradient|gathered|rule/(\w+/)*)/?"
_LOCAL = r"layers/fast/\w+/(anchor|w|s)/"
STATES = (
  *((r"levels/\w+/replay/.+", ("chunk",) * k) for k in range(7)),
  # Fast weights of feed-forward levels, split as the slow ones over `tensor`.
  (_FEED_FORWARD + r"w_(gate|up)", ("layer", "act_embed", "mlp")),
  (_FEED_FORWARD + r"w_down", ("layer", "mlp", "act_embed")),
  (_LOCAL + r"w_(gate|up)", ("level", "act_embed", "mlp")),
  (_LOCAL + r"w_down", ("level", "mlp", "act_embed")),
  (r"layers/(.+/)?(anchor|w|s|carried)/\w+", ("heads", "mem_in", "mem_out")),
  (r"(layers|levels)/(.+/)?(phase|segment|place|weight|clock)", ()),
)

# Of the small network that an optimizer keeps for a matrix: its hidden axis.
LEARNED = {"w_in": 1, "w_out": 0}

_LARGE = 2**20  # Bytes from which a replicated leaf is worth a line.


def mesh(
  replica: Annotated[int, _SIZE] = 1,
  fsdp: Annotated[int, _SIZE] = -1,
  sequence: Annotated[int, _SIZE] = 1,
  tensor: Annotated[int, _SIZE] = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """The device mesh; at most one size is -1, which takes what is left.

  Args:
    replica: devices that hold copies of all weights; spans slices.
    fsdp: devices that split weights and batch; -1: what is left, in a config
      as much as the batch fills.
    sequence: devices that split the tokens of a row.
    tensor: devices that split heads, feed-forward width and vocabulary.
    devices: all of them by default.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or replica
      is not a multiple of the number of slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(zip(AXES, (replica, fsdp, sequence, tensor)))
  fields.check("mesh", mesh, sizes)
  given = ", ".join(f"mesh.{k}={v}" for k, v in sizes.items())
  open_axes = [k for k, v in sizes.items() if v == -1]
  if len(open_axes) > 1:
    raise ValueError(f"one of the mesh sizes may be -1, got {given}")
  fixed = math.prod(v for v in sizes.values() if v != -1)
  if open_axes:
    sizes[open_axes[0]] = max(len(devices) // fixed, 1)
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f"the mesh must have as many places as there are devices "
      f"({len(devices)}), got {given}; set one size to -1"
    )
  # Auto: embeddings and scans of Explicit meshes need a sharding each.
  auto = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if slices > 1:
    return Mesh(_over_slices(sizes, slices, devices), AXES, axis_types=auto)
  # jax.make_mesh splits a side of the torus on some kinds of chips only.
  placed = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )
  return Mesh(placed, AXES, axis_types=auto)


def _over_slices(
  sizes: dict[str, int], slices: int, devices: Sequence[jax.Device]
) -> np.ndarray:
  """Devices of several slices: only the replicas cross the slow network."""
  if sizes["replica"] % slices:
    raise ValueError(
      f"mesh.replica must be a multiple of the {slices} slices, got "
      f"{sizes['replica']}; set mesh.replica={slices}"
    )
  within = {**sizes, "replica": sizes["replica"] // slices}
  return mesh_utils.create_hybrid_device_mesh(
    tuple(within.values()),
    (slices, 1, 1, 1),
    devices,
    allow_split_physical_axes=True,
  )


def spec(*names: str | None) -> P:
  """The mesh axes of an array whose axes have these logical names."""
  return P(*(None if name is None else LOGICAL[name] for name in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Lays an activation out by its logical names; x itself without a mesh.

  An axis of one is not split: a row of a batch, where rows are mapped over.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not set(AXES) <= set(mesh.axis_names):
    return x
  free = lambda name: tuple(a for a in _over(name) if a in mesh.auto_axes)
  split = [None if n == 1 else free(name) for n, name in zip(x.shape, names)]
  return jax.lax.with_sharding_constraint(x, P(*split))


def by_tokens(
  f: Callable[..., Tree],
  x_BxTxD: jax.Array,
  kernels: Sequence[jax.Array],
  names: Sequence[tuple[str, ...]],
) -> Tree:
  """f(x, *kernels), each device with tokens of its own and all of the kernels.

  Kernels are gathered, and their gradients scattered to their shards. Said
  axis by axis, since XLA makes a sum over all devices of a gradient that is
  split in both of its axes.

  Args:
    f: of tokens [b, t, D] and whole kernels, to arrays [b, t, ...].
    x_BxTxD: tokens.
    kernels: matrices.
    names: the logical axes of each.
  """

  def whole(w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    over = [(i, a) for i, name in enumerate(axes) for a in _over(name)]
    # Over `tensor` first, while shards are small.
    for i, axis in sorted(over, key=lambda entry: entry[1] != "tensor"):
      w = jax.lax.all_gather(w, axis, axis=i, tiled=True)
    return w

  tokens = spec("batch", "tokens", None)
  return jax.shard_map(
    lambda x, *w: f(x, *map(whole, w, names)),
    in_specs=(tokens, *(spec(*axes) for axes in names)),
    out_specs=tokens,
  )(x_BxTxD, *kernels)


def with_reach(
  f: Callable[..., Tree],
  reach: int,
  near: Sequence[jax.Array],
  own: Sequence[jax.Array] = (),
  whole: Sequence[jax.Array] = (),
) -> Tree:
  """f of tokens and of those just before them, each shard with its own.

  What looks a few tokens back then sends these alone over `length`.

  Args:
    f: of near [B, reach + t, ...], own [B, t, ...] and whole, to arrays
      [B, t, ...]; token i of a shard stands at reach + i of `near`, and 0 is
      what stands before the first token of a row.
    reach: tokens to look back.
    near, own: arrays [B, T, ...].
    whole: arrays that every shard reads.
  """
  shards = length_shards(near[0].shape[1])
  if shards == 1:
    lay = lambda x: jnp.pad(x, [(0, 0), (reach, 0), *[(0, 0)] * (x.ndim - 2)])
    return f(*map(lay, near), *own, *whole)
  (axis,) = _over("length")

  def run(near: list, own: list, whole: list) -> Tree:
    return f(*(_reaching(x, reach, axis, shards) for x in near), *own, *whole)

  tokens = P(None, axis)
  return jax.shard_map(
    run,
    in_specs=(tokens, tokens, P()),
    out_specs=tokens,
    axis_names={axis},
  )(list(near), list(own), list(whole))


def _reaching(x: jax.Array, reach: int, axis: str, shards: int) -> jax.Array:
  """A shard's tokens [B, t, ...] after the `reach` tokens before them."""
  size, pieces = x.shape[1], [x]
  for by in range(1, min(-(-reach // size), shards - 1) + 1):
    last = x[:, max(by * size - reach, 0) :]
    pairs = [(i, i + by) for i in range(shards - by)]
    pieces.insert(0, jax.lax.ppermute(last, axis, pairs))
  missing = reach + size - sum(piece.shape[1] for piece in pieces)
  rest = [(0, 0)] * (x.ndim - 2)
  x = jnp.concatenate(pieces, axis=1)
  return jnp.pad(x, [(0, 0), (missing, 0), *rest]) if missing else x


def whole_rows(x_BxT: jax.Array) -> jax.Array:
  """[B, T, ...] with all tokens of a row where some of them were."""
  if length_shards(x_BxT.shape[1]) == 1:
    return x_BxT
  free = (P.UNCONSTRAINED,) * (x_BxT.ndim - 2)
  where = P(P.UNCONSTRAINED, None, *free)
  return jax.lax.with_sharding_constraint(x_BxT, where)


def length_shards(tokens: int) -> int:
  """Shards of the tokens of a row; 1 without a mesh or where they do not fit.

  Args:
    tokens: of a row.
  """
  mesh, axis = jax.sharding.get_abstract_mesh(), LOGICAL["length"]
  shards = mesh.shape.get(axis, 1)
  return 1 if tokens % shards or axis in mesh.manual_axes else shards


def shard_shape(
  shape: Sequence[int], *names: str | None
) -> tuple[int, ...] | None:
  """What a device has of an activation; None if its axes do not divide.

  Without a mesh the shape itself.

  Args:
    shape, names: of the whole, and the logical names of its axes.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  if not set(AXES) <= set(sizes):
    return tuple(shape)
  parts = [math.prod(sizes[a] for a in _over(name)) for name in names]
  if any(n % part for n, part in zip(shape, parts)):
    return None
  return tuple(n // part for n, part in zip(shape, parts))


def _over(name: str | None) -> tuple[str, ...]:
  """The mesh axes of a logical one."""
  axes = None if name is None else LOGICAL[name]
  return (axes,) if isinstance(axes, str) else axes or ()


def path_name(path: Sequence[Any]) -> str:
  """'/'-joined names of a path in a tree: "blocks/mixer/w_q"."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def param_shardings(params: Tree, axes: Axes, mesh: Mesh) -> Tree:
  """Shardings of a tree of parameters (arrays or their shapes).

  Args:
    params: of a model, or some of them.
    axes: the model's, by path.
    mesh: where to.

  Raises:
    ValueError: a parameter without axes, or an axis that its part of the mesh
      does not divide.
  """

  def one(path: Sequence[Any], leaf: jax.Array) -> NamedSharding:
    name = path_name(path)
    if len(axes.get(name, ())) != leaf.ndim:
      raise ValueError(
        f"{name}: the model has no parameter of this name and of rank "
        f"{leaf.ndim}; its table of leaves has all that it has"
      )
    return _named(mesh, name, leaf.shape, axes[name])

  return jax.tree_util.tree_map_with_path(one, params)


def decode_shardings(params: Tree, axes: Axes, mesh: Mesh) -> Tree:
  """Shardings of parameters that read one token at a time.

  A token needs all weights once: split over `fsdp` they would be gathered for
  each, so that every shard of it holds them whole, and `tensor` splits them.

  Args:
    params, axes, mesh: as of `param_shardings`.

  Raises:
    ValueError: as `param_shardings`.
  """
  whole = {
    name: tuple(_whole(axis) for axis in names) for name, names in axes.items()
  }
  return param_shardings(params, whole, mesh)


def _whole(axis: str | None) -> str | None:
  return None if "fsdp" in _over(axis) else axis


def _named(
  mesh: Mesh, name: str, shape: Sequence[int], axes: Sequence[str | None]
) -> NamedSharding:
  """The sharding of logical axes, checked against the shape."""
  axes = list(axes)
  for i, (size, axis) in enumerate(zip(shape, axes)):
    over = _over(axis)
    parts = math.prod(mesh.shape[a] for a in over)
    if (size % parts and axis == "start_in") or (size == 1 and axis == "batch"):
      # Memories are narrower than meshes are long; one row is everyone's.
      axes[i] = None
    elif size % parts:
      sizes = ", ".join(f"mesh.{a}={mesh.shape[a]}" for a in over)
      raise ValueError(
        f"{name}: the axis {axis!r} of size {size} must be a multiple of its "
        f"{parts} shards ({sizes}); nearest: {-(-size // parts) * parts}, or "
        "another mesh"
      )
  return NamedSharding(mesh, spec(*axes))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of the arrays [B,T] of a batch."""
  return NamedSharding(mesh, spec("batch", "length"))


def rows_sharding(mesh: Mesh) -> NamedSharding:
  """Of an array [B], a number for each row of a batch."""
  return NamedSharding(mesh, spec("batch"))


def check_batch(
  mesh: Mesh, batch_size: int, sequence_length: int, accumulate: int = 1
) -> None:
  """Raises ValueError unless a batch divides over mesh and micro-batches."""
  shards = mesh.shape["replica"] * mesh.shape["fsdp"]
  parts = shards * accumulate
  if batch_size % parts:
    below = batch_size // parts * parts
    nearest = " or ".join(str(x) for x in (below, below + parts) if x)
    raise ValueError(
      "data.batch_size must be a multiple of mesh.replica * mesh.fsdp * "
      f"train.accumulate = {shards} * {accumulate}, got {batch_size}; "
      f"nearest: {nearest}"
    )
  if sequence_length % mesh.shape["sequence"]:
    raise ValueError(
      "data.sequence_length must be a multiple of mesh.sequence="
      f"{mesh.shape['sequence']}, got {sequence_length}"
    )


def state_shardings(
  tx: Any, params: Tree, shardings: Tree, replicated: NamedSharding
) -> Tree:
  """Shardings of `tx.init(params)`: a leaf's path ends in a parameter's path.

  A slot lies as its parameter, the learned memory of one (see `LEARNED`) with
  the parameter's leading axes and its hidden units over `fsdp`.

  Args:
    tx: an optax transformation.
    params: the parameters, or their shapes.
    shardings: of the parameters.
    replicated: for counters and whatever else is like no parameter.
  """
  by_path = {
    path: (x.shape, s)
    for (path, x), s in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings)
    )
  }

  def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    for start in range(len(path)):
      shape, s = by_path.get(path[start:], ((-1,), None))
      extra = leaf.ndim - len(shape)  # E.g. a history axis in front.
      if extra >= 0 and leaf.shape[extra:] == shape:
        return NamedSharding(s.mesh, P(*(None,) * extra, *s.spec))
      if path_name(path[-1:]) in LEARNED and path[start:-1] in by_path:
        return _learned(path_name(path[-1:]), leaf, *by_path[path[start:-1]])
    return replicated  # Counters.

  state = jax.eval_shape(tx.init, params)
  result = jax.tree_util.tree_map_with_path(one, state)
  for name, size in large_replicated(state, result):
    logging.getLogger(__name__).warning(
      "optimizer state %s (%.1f MiB) is on every device", name, size / 2**20
    )
  return result


def _learned(
  name: str,
  leaf: jax.ShapeDtypeStruct,
  shape: tuple[int, ...],
  sharding: NamedSharding,
) -> NamedSharding:
  """The sharding of a learned memory of a parameter of this shape."""
  lead = leaf.ndim - 2
  axes = (*sharding.spec, *(None,) * len(shape))[:lead]
  if leaf.shape[:lead] != shape[:lead] or "fsdp" in axes:
    axes = (None,) * lead
  spread = leaf.shape[lead + LEARNED[name]] % sharding.mesh.shape["fsdp"] == 0
  hidden = "fsdp" if spread else None
  last = (None, hidden) if LEARNED[name] else (hidden, None)
  return NamedSharding(sharding.mesh, P(*axes, *last))


def large_replicated(tree: Tree, shardings: Tree) -> Iterator[tuple[str, int]]:
  """(path, bytes) of leaves of 1 MiB and more that every device holds."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  for (path, leaf), s in zip(leaves, jax.tree.leaves(shardings)):
    size = leaf.size * leaf.dtype.itemsize
    if s.mesh.size > 1 and s.is_fully_replicated and size >= _LARGE:
      yield path_name(path), size


def sequence_shardings(state: Tree, mesh: Mesh) -> Tree:
  """Shardings of a language model's state: batch by batch, heads by head.

  Args:
    state: an `LMState`, or its shapes.
    mesh: where to.

  Raises:
    ValueError: a leaf without exactly one rule, or that does not divide.
  """

  def one(path: Sequence[Any], leaf: jax.Array) -> NamedSharding:
    name = path_name(path)
    return _named(mesh, name, leaf.shape, state_axes(name, leaf.ndim))

  return jax.tree_util.tree_map_with_path(one, state)


def state_axes(name: str, rank: int) -> tuple[str, ...]:
  """The logical names of the axes of a state, by its path and rank.

  Raises:
    ValueError: no rule fits.
  """
  lead = ("layer", "batch") if name.startswith("layers/") else ("batch",)
  letters = re.fullmatch(r"(?!levels/\w+/replay/).*_B((x\w)*)", name)
  found = [axes for rule, axes in STATES if re.fullmatch(rule, name)]
  if letters:
    found = [tuple(_LETTERS[x] for x in letters[1].split("x")[1:])]
  for axes in found:
    if len(lead + axes) == rank:
      return lead + axes
  raise ValueError(
    f"{name}: no sharding rule fits a state of rank {rank}; see STATES of "
    "nl_jax/sharding.py"
  )
