"""The chunk function of self-modifying Titans (paper eq. 83-90).

The equations are in docs/mathematics.md 3.

All memories of a layer learn one key with one gate, so what they share is made
once: the products of keys, the decays, one inverse a rate. Roles of one shape
lie side by side: w_in [K, R M], w_out [R M, K], a matrix memory [K, R K]. The
work is ordered by stages, and in a stage by role, so that products which do
not wait for each other stand next to each other.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from nl_jax.kernels import rank_one, walk
from nl_jax.memory import block as blocks
from nl_jax.memory import mlp, writing
from nl_jax.memory import rule as rules

MATRIX = mlp.Architecture(("w",), lambda x: x)


class Part(NamedTuple):
  """Memories that stand side by side and learn by one rule.

  Attributes:
    block: their weights, see `block.Block`.
    anchor: dict of [..., a, b], their weights at the anchor.
    outputs: of each role its output layer at the anchor; empty without one.
    roles: how many.
    architecture, residual: of each; `residual` adds the input.
    rule: how they learn.
    rate: a factor on eta.
  """

  block: blocks.Block
  anchor: rules.Weights
  outputs: list[jax.Array]
  roles: int
  architecture: mlp.Architecture
  residual: bool
  rule: rules.Rule
  rate: float

  def cut(
    self, name: str | None, W: jax.Array, counts: Sequence[int]
  ) -> list[jax.Array]:
    """The weights of so many adjacent roles each, of all roles together."""
    axis = W.ndim - (1 if name in self.architecture.inputs else 2)
    return _split(self.block.at.tile, W, counts, axis)

  def by_role(self, name: str, W: jax.Array) -> list[jax.Array]:
    """The weights of each role."""
    return self.cut(name, W, [1] * self.roles)

  def read_inputs(
    self, name: str, zs: Sequence[jax.Array], counts: Sequence[int]
  ) -> list[jax.Array]:
    """z W of an input layer at the anchor, each z of so many roles."""
    weights = self.cut(name, self.anchor[name], counts)
    starts: Sequence[Any] = [None] * len(counts)
    if self.block.at.ids is not None:
      starts = self.cut(name, self.block.begin(name), counts)
    return [self._through(*args, "nn") for args in zip(zs, weights, starts)]

  def read_outputs(
    self, hs: Sequence[jax.Array], form: str = "nn"
  ) -> list[jax.Array]:
    """h W (or h W^T) of each role's output layer at the anchor."""
    starts: Sequence[Any] = [None] * self.roles
    name = self.architecture.output
    if self.block.at.ids is not None and name is not None:
      starts = self.by_role(name, self.block.begin(name))
    each = zip(hs, self.outputs, starts)
    return [self._through(*args, form) for args in each]

  def _through(
    self, x: jax.Array, W: jax.Array, start: jax.Array | None, form: str
  ) -> jax.Array:
    """x W, by document: `start` in the place of W after the first."""
    at = self.block.at
    y = at.tile.mm(x, W, form, "anchor")
    if start is None or at.ids is None:
      return y
    own = jnp.swapaxes(at.ids, -1, -2) == 0
    return jnp.where(own, y, at.tile.mm(x, start, form, "anchor"))


def _split(
  tile: walk.Tile, x: jax.Array, counts: Sequence[int], axis: int
) -> list[jax.Array]:
  """Adjacent parts of an axis, of sizes in the ratio of `counts`."""
  if len(counts) == 1:
    return [x]
  size = x.shape[axis] // sum(counts)
  if not tile.fused:  # The derivative of slices would be a sum of padded ones.
    return [*jax.lax.split(x, [size * n for n in counts], axis)]
  ends = itertools.accumulate(counts)
  return [
    jax.lax.slice_in_dim(x, (end - n) * size, end * size, axis=axis)
    for n, end in zip(counts, ends)
  ]


def side_by_side(
  block: blocks.Block,
  roles: int,
  architecture: mlp.Architecture,
  residual: bool,
  rule: rules.Rule,
  rate: float = 1.0,
) -> Part:
  """A `Part` at the start of a chunk."""
  deviation = block.w if block.at.anchor is None else block.at.anchor
  anchor = {name: block.absolute(name, D) for name, D in deviation.items()}
  part = Part(block, anchor, [], roles, architecture, residual, rule, rate)
  if (name := architecture.output) is None:
    return part
  return part._replace(outputs=part.by_role(name, anchor[name]))


class _Pairs(NamedTuple):
  """What one part learns from a chunk.

  Attributes:
    deltas: by input layer, [..., C, R b], the errors of all roles.
    hidden: [..., C, M] of each role; errors: [..., C, K] at the output layer
      of each role. Empty without an output layer.
    terms: [..., C, K] of each role, which add up to its loss.
  """

  deltas: dict[str, jax.Array]
  hidden: list[jax.Array]
  errors: list[jax.Array]
  terms: list[jax.Array]


def _lanes(part: Part, x: jax.Array, roles: int) -> list[jax.Array]:
  """The equal parts of the last axis, one a role."""
  return _split(part.block.at.tile, x, [1] * roles, x.ndim - 1)


def _concatenated(parts: Sequence[jax.Array]) -> jax.Array:
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _outputs(part: Part, hidden: Sequence[jax.Array]) -> list[jax.Array]:
  """What each role's output layer makes of its hidden units, unfinished."""
  if part.architecture.output is None:
    return list(hidden)
  return part.read_outputs(hidden)


def read_anchor(part: Part, inputs: Sequence[jax.Array]) -> list[jax.Array]:
  """What each role makes of its input, at the anchor.

  Args:
    part: the memories.
    inputs: [..., C, K] of each role; one object where roles share it, and
      then these are adjacent.
  """
  groups = [list(g) for _, g in itertools.groupby(inputs, key=id)]
  zs, counts = [g[0] for g in groups], [len(g) for g in groups]
  # Roles with one input: one product.
  names = part.architecture.inputs
  made = [part.read_inputs(name, zs, counts) for name in names]
  hidden = []
  for count, *each in zip(counts, *made):
    hidden += _lanes(part, part.architecture.hidden(*each), count)
  out = _outputs(part, hidden)
  finish = part.architecture.finish or (lambda y: y)
  out = [finish(y) for y in out]
  return [z + y for z, y in zip(inputs, out)] if part.residual else out


def pairs(
  parts: Sequence[Part], k: jax.Array, targets: Sequence[list[jax.Array]]
) -> list[_Pairs]:
  """Layer inputs and errors of every token, at the anchor (eq. 84).

  Args:
    parts: the memories.
    k: [..., C, K], the key of all, rounded where the policy says so.
    targets: of each part [..., C, K] of each role.
  """
  made, pulls, hiddens = [], [], []
  for part in parts:
    names = part.architecture.inputs
    made.append([part.read_inputs(n, [k], [part.roles])[0] for n in names])
  for part, inputs in zip(parts, made):
    h, pull = jax.vjp(part.architecture.hidden, *inputs)
    if part.architecture.output is not None:
      h = part.block.at.tile.rounded(h)
    hiddens.append(_lanes(part, h, part.roles))
    pulls.append(pull)
  outs = [_outputs(part, h) for part, h in zip(parts, hiddens)]
  errors: list[list[jax.Array]] = []
  terms: list[list[jax.Array]] = []
  for part, out, target in zip(parts, outs, targets):
    errors.append([])
    terms.append([])
    for y, goal in zip(out, target):
      back = None
      if part.architecture.finish is not None:
        y, back = jax.vjp(part.architecture.finish, y)
      y = k + y if part.residual else y
      error, term = rules.output_error(part.rule, y, goal)
      errors[-1].append(error if back is None else back(error)[0])
      terms[-1].append(term)
  result = []
  for part, units, pull, wrong, loss in zip(
    parts, hiddens, pulls, errors, terms
  ):
    alone = part.architecture.output is None
    below = wrong if alone else part.read_outputs(wrong, "nt")
    deltas = pull(_concatenated(below))
    by_layer = dict(zip(part.architecture.inputs, deltas))
    if alone:
      result.append(_Pairs(by_layer, [], [], loss))
    else:
      result.append(_Pairs(by_layer, units, wrong, loss))
  return result


class Written(NamedTuple):
  """Parts after a chunk.

  Attributes:
    blocks: of each part, after the chunk.
    read: (part, q [..., C, K]) -> [..., C, K], of a part of one role, at
      every token; None where there are writes alone.
    sums: those of `rule.Metrics`, means over roles, part after part,
      [..., 1, n].
  """

  blocks: list[blocks.Block]
  read: Callable[[int, jax.Array], jax.Array] | None
  sums: jax.Array


def by_chunk(
  parts: Sequence[Part],
  k: jax.Array,
  targets: Sequence[list[jax.Array]],
  gates: rules.Gates,
) -> Written:
  """Writes a chunk into all parts by one inverse (docs/mathematics.md 2.5).

  Args:
    parts: the memories; one retention and one momentum for all.
    k: [..., C, K], the key of all.
    targets: of each part [..., C, K] of each role.
    gates: columns [..., C, 1].
  """
  at = parts[0].block.at
  tokens = rank_one.Tokens(
    gates.log_alpha, gates.log_beta, at.real, ids=at.ids, tile=at.tile
  )
  learned = pairs(parts, k, targets)
  chunks: dict[Any, rank_one.Chunk] = {}
  squares = []
  for i, (part, pair) in enumerate(zip(parts, learned)):
    own, square = gates._replace(eta=part.rate * gates.eta), cast(Any, 0.0)
    for name, delta in pair.deltas.items():
      (chunk,) = _chunks(part, tokens, own, name, [k], [delta])
      chunks[i, name, 0] = chunk
      sizes = _sizes(at.tile, k) * _sizes(at.tile, delta, part.roles)
      square += jnp.square(chunk.write) * sizes
    output, last = part.architecture.output, []
    outputs = _chunks(part, tokens, own, output, pair.hidden, pair.errors)
    for r, (chunk, h) in enumerate(zip(outputs, pair.hidden)):
      chunks[i, output, r] = chunk
      last.append(jnp.square(chunk.write) * _sizes(at.tile, h))
    if last:
      sizes = _sizes(at.tile, _concatenated(pair.errors), part.roles)
      square += _concatenated(last) * sizes
    squares.append(square)
  steps = jnp.sqrt(_concatenated(squares)) * at.real
  steps = jnp.sum(steps, axis=-2, keepdims=True)
  solved = rank_one.recall(list(chunks.values()), parts[0].rule.erase_of)
  rows = dict(zip(chunks, solved))

  def read(i: int, q: jax.Array) -> jax.Array:
    part = parts[i]

    def layer(name: str, x: jax.Array) -> jax.Array:
      if part.rule.read == "chunk_start":
        if name == part.architecture.output:
          return part.read_outputs([x])[0]
        return part.read_inputs(name, [x], [1])[0]
      return chunks[i, name, 0].read(x, part.rule.read, rows[i, name, 0])

    y = part.architecture(layer, q)
    return q + y if part.residual else y

  done = []
  for i, part in enumerate(parts):
    ends: dict[str, list] = {name: [] for name in part.block.w}
    for key, chunk in chunks.items():
      if key[0] == i:
        ends[key[1]].append(chunk.end(rows[key]))
    after = _after(part, ends)
    if part.rule.retention_target == "zero":  # What decayed is the weight.
      w = {n: W - part.block.begin(n) for n, W in after.w.items()}
      after = after._replace(w=w)
    done.append(after)
  sums = []
  for part, block, pair in zip(parts, done, learned):
    mine, steps = steps[..., : part.roles], steps[..., part.roles :]
    sums.append(_sums(part, block, pair, mine, gates))
  return Written(done, read, jnp.concatenate(sums, axis=-1))


def _chunks(
  part: Part,
  tokens: rank_one.Tokens,
  gates: rules.Gates,
  name: str | None,
  us: Sequence[jax.Array],
  deltas: Sequence[jax.Array],
) -> list[rank_one.Chunk]:
  """Of a layer the weight matrices of each role, or of all that share u."""
  if not us or name is None:
    return []
  block, rule = part.block, part.rule
  cut = lambda W: part.cut(name, W, [part.roles // len(us)] * len(us))
  erases = rules.erases(rule, name)
  nothing: Sequence[Any] = [None] * len(us)
  Ds, starts = cut(block.w[name]), cut(block.begin(name))
  Ss = cut(block.s[name]) if name in block.s else nothing
  Rs: Sequence[Any] = starts
  fresh = nothing
  if rule.retention_target == "zero":
    Ds = [D + start for D, start in zip(Ds, starts)]
    Rs, fresh = nothing, starts
  made = []
  for u, delta, D, S, R, begun in zip(us, deltas, Ds, Ss, Rs, fresh):
    rates = rules.rates(rule, gates, u, block.at.real, erases)
    made.append(
      rank_one.Chunk(
        tokens, u, delta, rates.write, rates.erase, D, S, R, fresh=begun
      )
    )
  return made


def _after(
  part: Part, ends: dict[str, list[tuple[jax.Array, jax.Array | None]]]
) -> blocks.Block:
  """The block of a part from the ends of its layers, by role or for all."""
  w, s = {}, {}
  for name, each in ends.items():
    axis = -1 if name in part.architecture.inputs else -2
    made = [jnp.concatenate(x, axis) for x in zip(*each) if x[0] is not None]
    w[name] = made[0]
    if len(made) > 1:
      s[name] = made[1]
  return part.block._replace(w=w, s=s)


def _sizes(tile: walk.Tile, x: jax.Array, roles: int = 1) -> jax.Array:
  """Squared norms of the rows of each role, [..., C, R b] to [..., C, R]."""
  x, size = jnp.square(x), x.shape[-1] // roles
  if roles == 1:
    return jnp.sum(x, axis=-1, keepdims=True)
  if not tile.fused:
    return x.reshape(*x.shape[:-1], roles, size).sum(axis=-1)
  # By the matrix unit: sums over lanes, one role after the other, are dear.
  lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[-1], roles), 0)
  role = jax.lax.broadcasted_iota(jnp.int32, (x.shape[-1], roles), 1)
  begin = role * size
  ones = jnp.where((lane >= begin) & (lane < begin + size), 1.0, 0.0)
  return tile.mm(x, ones.reshape((1,) * (x.ndim - 2) + ones.shape))


def _sums(
  part: Part,
  after: blocks.Block,
  pair: _Pairs,
  steps: jax.Array,
  gates: rules.Gates,
) -> jax.Array:
  """The sums of a part, means over its roles.

  Args:
    part, after, pair: the part, its block after the chunk, what it learned.
    steps: [..., 1, R], of each role the sizes of its writes, added up.
    gates: columns [..., C, 1], without the part's rate.
  """
  absolute = {name: after.absolute(name, D) for name, D in after.w.items()}
  weights = [part.by_role(name, W) for name, W in absolute.items()]
  sizes = [blocks.norm(each) for each in zip(*weights)]
  own = gates._replace(eta=part.rate * gates.eta)
  loss = blocks.total(after.at, jnp.asarray(sum(pair.terms)))
  steps = jnp.sum(steps, axis=-1, keepdims=True)
  means = (x / part.roles for x in (loss, steps, jnp.asarray(sum(sizes))))
  return blocks.metric_sums(after.at, own, *means)


def by_token(
  parts: Sequence[Part],
  k: jax.Array,
  targets: Sequence[list[jax.Array]],
  gates: rules.Gates,
) -> Written:
  """`by_chunk` by the token loop, role by role: the definition; no reads."""
  done, sums = [], []
  for part, goals in zip(parts, targets):
    own = gates._replace(eta=part.rate * gates.eta)
    ends: dict[str, list] = {name: [] for name in part.block.w}
    each: list[jax.Array] = []
    for r, goal in enumerate(goals):
      _, after, total = writing.write_and_read(
        _forward(part),
        _role(part, r),
        part.rule,
        None,
        k,
        goal,
        own,
        by_token=True,
      )
      each.append(total)
      for name, W in after.w.items():
        ends[name].append((W, after.s.get(name)))
    done.append(_after(part, ends))
    sums.append(sum(each) / part.roles)
  return Written(done, None, jnp.concatenate(sums, axis=-1))


def _forward(part: Part) -> rules.Forward:
  """The architecture of one role."""
  inner: Any = part.architecture
  return (lambda layer, z: z + inner(layer, z)) if part.residual else inner


def _role(part: Part, role: int) -> blocks.Block:
  """The block of one role."""

  def cut(tree: rules.Weights | None) -> Any:
    if tree is None:
      return None
    return {n: part.by_role(n, W)[role] for n, W in tree.items()}

  block, at = part.block, part.block.at
  return block._replace(
    start=cut(block.start), w=cut(block.w), s=cut(block.s),
    at=at._replace(anchor=cut(at.anchor)),
  )  # fmt: skip
