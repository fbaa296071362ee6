"""Self-modifying Titans (paper eq. 83-90; docs/mathematics.md 3).

Memories M_k, M_v, M_eta, M_alpha (the generators) produce the key, the value
and the gates with which all memories, M_memory too, are then written:

    k_t = l2(M_k(z^k)),  v_t = M_v(z^v),  eta_t, alpha_t = gates(M(z^k))
    M_*,t = rule 2.3 with key k_t and target M_*(v_t), for every memory
    y_t = M_memory,t(q_t)

Generators are read at their chunk's start and never see M_memory, so the
algorithm has two passes (3.4): the generators, then an ordinary memory. With
one chunk length for both they are one chunk function, with two they are two
walks. All is differentiated, through every write.

Departures from the print: the sign of eq. 92 and the index of eq. 90 are
corrected (docs/mathematics.md 8.3); M_eta and M_alpha give one scalar a head
through a learned vector, so that the chunk form stays exact (`gate_shape`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nl_jax.kernels import walk
from nl_jax.memory import block as blocks
from nl_jax.memory import chunked, linear, mlp, roles
from nl_jax.memory import rule as rules
from nl_jax.memory.self_modifying_options import ROLES as ROLES
from nl_jax.memory.self_modifying_options import (
  GeneratorOptions as GeneratorOptions,
)
from nl_jax.memory.self_modifying_options import Options as Options


class State(NamedTuple):
  """Fast weights of all memories of a layer.

  Attributes:
    generators: of the R = `Options.laid` roles side by side: w [B, H, K, R K],
      or w_in (w_gate) [B, H, K, R M] and w_out [B, H, R M, K]; None where no
      role is adaptive.
    memory: M_memory, weights [B, H, a, b].
  """

  generators: chunked.MemoryState | None
  memory: chunked.MemoryState


class Metrics(NamedTuple):
  """`rule.Metrics` of both passes; generators' are means over roles."""

  generators: rules.Metrics | None
  memory: rules.Metrics


def init(
  key: jax.Array, options: Options, heads: int, key_dim: int
) -> dict[str, dict[str, jax.Array]]:
  """The learned starts and gate heads, all slow parameters, float32.

  Returns:
    {role: weights (H, a, b)} for every generator and "memory", and "gate":
    w_eta, w_alpha (H, K) and b_eta, b_alpha (H,) (`gate_source="memory"`;
    biases (H, K) with gates of a channel), b_beta (H,) with momentum.
  """
  roles = (*options.generator_roles, "memory")
  keys = jax.random.split(key, len(roles))
  params = {}
  for role, k in zip(roles, keys):
    if options.memory == "linear":
      params[role] = linear.init(k, heads, key_dim, key_dim)
      continue
    # Generators are read at z, of norm about sqrt(K); M_memory at unit q, k.
    in_std = 1.0 if role == "memory" else key_dim**-0.5
    params[role] = mlp.init(
      k, heads, key_dim, options.hidden or key_dim,
      arch=options.memory, in_std=in_std,
    )  # fmt: skip
  gate: dict[str, Any] = {}
  if options.gate_source == "memory":
    channel = options.gate_shape == "channel"
    shape = (heads, key_dim) if channel else (heads,)
    for name, bias in (
      ("eta", options.eta_bias),
      ("alpha", options.alpha_bias),
    ):
      gate_key = jax.random.fold_in(key, len(gate))
      scale = 0.02 * jax.random.normal(gate_key, (heads, key_dim), jnp.float32)
      gate[f"w_{name}"] = scale
      gate[f"b_{name}"] = jnp.full(shape, bias, jnp.float32)
  if options.momentum != "off":
    # sigmoid(2.197) = 0.9
    gate["b_beta"] = jnp.full((heads,), jnp.log(9.0), jnp.float32)
  if gate:
    params["gate"] = gate
  return params


def lay(
  by_role: dict[str, dict[str, jax.Array]], options: Options
) -> dict[str, jax.Array]:
  """The weights [..., a, b] of all generators as `State` has them."""
  trees = [by_role[role] for role in options.laid]
  axis = lambda name: -1 if name in options.architecture.inputs else -2
  return {
    name: jnp.concatenate([tree[name] for tree in trees], axis=axis(name))
    for name in trees[0]
  }


def start(params: dict, batch: int, options: Options) -> State:
  """All memories at the start of a sequence."""
  generators = None
  if options.generator_roles:
    laid = lay(params, options)
    generators = chunked.start(laid, batch, options.generator_rule)
  memory = chunked.start(params["memory"], batch, options.memory_rule)
  return State(generators, memory)


def _l2(x: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6)


def _log_sigmoid(x: jax.Array) -> jax.Array:
  return -(jnp.maximum(-x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x))))


def _slow_gate(params: dict, options: Options) -> dict[str, jax.Array]:
  """The gate heads as a walk takes them, leaves [H, 1, K] or [H, 1, 1]."""
  gate = params.get("gate", {})
  shape = lambda g: g[:, None, :] if g.ndim == 2 else g[:, None, None]
  return {name: shape(g) for name, g in gate.items()}


def _generate(
  gate: dict[str, jax.Array],
  options: Options,
  z: dict[str, jax.Array],
  made: dict[str, jax.Array],
  static: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array, rules.Gates]:
  """(q, k, v, gates) from the inputs z and what the generators made of them.

  Args:
    gate: of `_slow_gate`, with the leading axes of a chunk function.
    options: the switches.
    z: "q", "k", "v" [..., C, K].
    made: the same of the adaptive roles.
    static: logits of eta and alpha [..., C, 1], with `gate_source="static"`.

  Returns:
    q, k, v [..., C, K] and gates [..., C, 1], or [..., C, K] a channel.
  """

  def logit(name: str) -> jax.Array:
    x = made.get(name, z["k"]) * gate[f"w_{name}"]
    if options.gate_shape == "head":
      x = jnp.sum(x, axis=-1, keepdims=True)
    return x + gate[f"b_{name}"]

  eta, alpha = static or (logit("eta"), logit("alpha"))
  log_beta = None
  if options.momentum != "off":
    log_beta = _log_sigmoid(gate["b_beta"]) + jnp.zeros_like(eta[..., :1])
  gates = rules.Gates(
    options.eta_max * jax.nn.sigmoid(eta), _log_sigmoid(alpha), log_beta
  )
  k, q = _l2(made.get("k", z["k"])), _l2(made.get("q", z["q"]))
  return q, k, made.get("v", z["v"]), gates


def _targets(
  part: Options | GeneratorOptions,
  side: roles.Part,
  v: jax.Array,
) -> list[jax.Array]:
  """What each memory of a part is to learn from v [..., C, K] (eq. 84)."""
  v = _l2(v) if part.value_norm == "l2" else v
  goals = [v] * side.roles
  if part.value_source == "self":
    goals = roles.read_anchor(side, goals)
  return [_l2(v) for v in goals] if part.value_norm == "target" else goals


def _body(
  options: Options,
  by_token: bool,
  slow: dict,
  now: walk.State,
  x: tuple,
  at: walk.At,
) -> tuple[walk.State, dict, jax.Array]:
  """Generators, and with its weights in `now` M_memory too, over a chunk.

  Args:
    options: every switch.
    by_token: write one token at a time, the definition; generators alone.
    slow: "generators", "memory" (learned starts) and "gate".
    now: w and s by "generators" and "memory".
    x: ({"q", "k", "v"}, static gates or None), see `_generate`.
    at: the chunk.

  Returns:
    The state, {"y"} or {"q", "k", "v", "gates"}, and the sums of the parts,
    one after the other.
  """
  if options.stop_grad_writes:
    now = jax.lax.stop_gradient(now)
  z, static = x

  def part(name: str, own: Options | GeneratorOptions, *rest) -> roles.Part:
    anchor = None if at.anchor is None else at.anchor[name]
    block = blocks.Block(
      slow[name], now.w[name], now.s[0][name], {}, at._replace(anchor=anchor)
    )
    count = len(options.laid) if name == "generators" else 1
    return roles.side_by_side(
      block, count, options.architecture, own.residual, *rest
    )

  gen = options.generators
  parts = [part("generators", gen, options.generator_rule, gen.rate)]
  inputs = [z[r if r in ("q", "v") else "k"] for r in options.laid]
  with jax.named_scope("generators"):  # In a trace: writes are of all.
    made = dict(zip(options.laid, roles.read_anchor(parts[0], inputs)))
    q, k, v, gates = _generate(slow["gate"], options, z, made, static)
    k, eta = at.tile.keys(k, gates.eta)
    gates = gates._replace(eta=eta)
    targets = [_targets(gen, parts[0], v)]
  if "memory" in now.w:
    parts.append(part("memory", options, options.memory_rule))
    targets.append(_targets(options, parts[1], v))
  write = roles.by_token if by_token else roles.by_chunk
  written = write(parts, k, targets, gates)
  names = ("generators", "memory")[: len(parts)]
  after = dict(zip(names, written.blocks))
  out = {"q": q, "k": k, "v": v, "gates": gates}
  if written.read is not None and "memory" in now.w:
    out = {"y": written.read(1, q)}
  w = {name: block.w for name, block in after.items()}
  s = {name: block.s for name, block in after.items()}
  return walk.State(w, (s, now.s[1])), out, written.sums


def update(
  params: dict,
  state: State,
  z_q: jax.Array,
  z_k: jax.Array,
  z_v: jax.Array,
  *,
  options: Options,
  static_gates: tuple[jax.Array, jax.Array] | None = None,
  segment_ids: jax.Array | None = None,
  at_edge: bool = False,
  aligned: bool = False,
  run: chunked.Run | None = None,
) -> tuple[jax.Array, State, Metrics]:
  """Writes T tokens into all memories and reads M_memory at each.

  Args:
    params: from `init`.
    state: where the sequences stand.
    z_q, z_k, z_v: the three projected inputs, [B, T, H, K].
    options: every switch.
    static_gates: logits of eta and alpha, [B, T, H], for
      `gate_source="static"`.
    segment_ids: int32 [B, T], 0 is padding; None continues the document.
    at_edge, aligned, run: as `chunked.walk`; for both chunk lengths.

  Returns:
    (y [B, T, H, K], state, metrics).

  Raises:
    ValueError: `static_gates` missing or not asked for; gates of a channel
      with another implementation than the reference.
  """
  if (static_gates is None) != (options.gate_source == "memory"):
    raise ValueError(
      f"model.mixer.gate_source={options.gate_source!r} and static_gates="
      f"{'None' if static_gates is None else 'given'} do not fit"
    )
  by_token = run is not None and run.implementation == "reference"
  if options.gate_shape == "channel" and not by_token:
    raise ValueError(
      "gates of one value a channel run only with "
      "Run(implementation='reference')"
    )
  grid: Any = dict(
    segment_ids=segment_ids, at_edge=at_edge, aligned=aligned, run=run
  )
  wide = jax.tree.leaves(state.memory.w)[0].dtype
  cast = lambda tree: jax.tree.map(lambda x: x.astype(wide), tree)
  slow = {"gate": _slow_gate(params, options), "memory": params["memory"]}
  z = {"q": z_q, "k": z_k, "v": z_v}
  joint = options.chunk_gen == options.chunk_memory and not by_token
  if options.generator_roles:
    slow["generators"] = lay(params, options)
  slow = cast(slow)
  if options.generator_roles and joint:
    return _one_walk(slow, state, (z, static_gates), options, grid)
  if state.generators is not None:
    made, generators, first = _first_pass(
      slow, state.generators, (z, static_gates), options, by_token, grid
    )
  else:
    swap = lambda x: jnp.swapaxes(x.reshape(*x.shape[:3], -1), 1, 2)
    heads_first = jax.tree.map(swap, cast((z, static_gates)))
    gate = jax.tree.map(lambda g: g[None], slow["gate"])
    made = _generate(gate, options, heads_first[0], {}, heads_first[1])
    made = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), made)
    generators, first = None, None
  q, k, v, gates = made
  if options.gate_shape == "head":
    gates = jax.tree.map(lambda g: g[..., 0], gates)
  elif gates.log_beta is not None:
    gates = gates._replace(log_beta=gates.log_beta[..., 0])
  y, memory, second = chunked.update(
    options.forward(options.residual), params["memory"], state.memory,
    q, k, v, gates,
    rule=options.memory_rule,
    target=lambda block, v: _memory_target(options, block, v),
    name=f"smt_{options.memory}_memory", **grid,
  )  # fmt: skip
  return y, State(generators, memory), Metrics(first, second)


def _memory_target(
  options: Options, block: blocks.Block, v: jax.Array
) -> jax.Array:
  """What M_memory learns in a walk of its own."""
  side = roles.side_by_side(
    block, 1, options.architecture, options.residual, options.memory_rule
  )
  return _targets(options, side, v)[0]


@jax.named_scope("memory")
def _one_walk(
  slow: dict, state: State, xs: tuple, options: Options, grid: dict
) -> tuple[jax.Array, State, Metrics]:
  """Both passes as one chunk function."""

  def both(field: str) -> Any:
    return {
      "generators": getattr(state.generators, field),
      "memory": getattr(state.memory, field),
    }

  together = state.memory._replace(
    anchor=both("anchor"), w=both("w"), s=both("s")
  )
  out, after, sums = chunked.walk(
    functools.partial(_body, options, False), together, slow, xs,
    chunk=options.chunk_memory, group=options.remat_group,
    name=f"smt_{options.memory}", **grid,
  )  # fmt: skip

  def own(name: str) -> Any:
    of: Any = lambda tree: tree[name]
    return after._replace(anchor=of(after.anchor), w=of(after.w), s=of(after.s))

  count = len(rules.Metrics._fields)
  metrics = blocks.metrics(sums[..., :count]), blocks.metrics(sums[..., count:])
  y = out["y"].reshape(xs[0]["q"].shape)
  return y, State(own("generators"), own("memory")), Metrics(*metrics)


@jax.named_scope("generators")
def _first_pass(
  slow: dict,
  state: chunked.MemoryState,
  xs: tuple,
  options: Options,
  by_token: bool,
  grid: dict,
) -> tuple:
  """Runs the generators over a call: ((q, k, v, gates), state, metrics)."""
  alone = {name: x for name, x in slow.items() if name != "memory"}
  within: Any = lambda tree: {"generators": tree}
  own = state._replace(
    anchor=within(state.anchor), w=within(state.w), s=within(state.s)
  )
  out, after, sums = chunked.walk(
    functools.partial(_body, options, by_token), own, alone, xs,
    chunk=options.chunk_gen, group=options.remat_group,
    name=f"smt_{options.memory}_generators", **grid,
  )  # fmt: skip
  heads = xs[0]["q"].shape[:3]
  out = jax.tree.map(lambda x: x.reshape(*heads, -1), out)
  of: Any = lambda tree: tree["generators"]
  after = after._replace(anchor=of(after.anchor), w=of(after.w), s=of(after.s))
  made = out["q"], out["k"], out["v"], out["gates"]
  return made, after, blocks.metrics(sums)
