"""What a policy of products costs in precision: walks against float32.

Products are emulated: the XLA form of a walk rounds operands to bfloat16 as
the policy says and adds up in float32, which is what the matrix unit does. So
the table needs no TPU. Keys are random or as bad as they get: nearly or wholly
the same, at rates up to 2, where the erase system is worst conditioned.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from nl_jax import memory
from nl_jax.kernels import walk
from nl_jax.memory import self_modifying

_SHAPE = (2, 512, 2, 64)  # Rows, tokens, heads, K.
_CHUNK = 64
# Name, correlation of keys, rate (None: sigmoid of a normal).
CASES = (
  ("random keys, rates sigmoid", 0.0, None),
  ("correlation 0.9, rate 0.95", 0.9, 0.95),
  ("identical keys, rate 1", 1.0, 1.0),
  ("correlation 0.9, rate 1.9", 0.9, 1.9),
  ("identical keys, rate 2", 1.0, 2.0),
)
POLICIES = ("f32", "lean", "lean2")


def _keys(key: jax.Array, correlation: float) -> jax.Array:
  own, shared = jax.random.split(key)
  B, _, H, K = _SHAPE
  x = jax.random.normal(own, _SHAPE)
  y = jax.random.normal(shared, (B, 1, H, K))
  x = (1 - correlation) ** 0.5 * x + correlation**0.5 * y
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _error(x: Any, y: Any) -> float:
  """Largest relative to the largest value, over all arrays."""
  each = jax.tree.map(
    lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), x, y
  )
  return max(float(e) for e in jax.tree.leaves(each))


def _delta(
  correlation: float, rate: float | None, policy: str, decays: bool = True
) -> Any:
  """Reads and last state of the gated delta rule, or without decay."""
  keys = jax.random.split(jax.random.key(0), 5)
  shape = _SHAPE[:3]
  rule = memory.Rule(
    chunk=_CHUNK, objective="dot", dgd_coef="decayed",
    retention_target="zero", erase_of="whole",
  )  # fmt: skip
  k, v = _keys(keys[0], correlation), jax.random.normal(keys[1], _SHAPE)
  q = _keys(keys[2], 0.0)
  eta = jax.nn.sigmoid(jax.random.normal(keys[3], shape))
  eta = eta if rate is None else jnp.full(shape, rate)
  alpha = jax.nn.log_sigmoid(jax.random.normal(keys[4], shape) + 4.0)
  alpha = alpha if decays else 0 * alpha
  state = memory.chunked.start(
    {"w": jnp.zeros((_SHAPE[2], _SHAPE[3], _SHAPE[3]))}, _SHAPE[0], rule
  )
  y, state, _ = memory.linear.update(
    None, state, q, k, v, memory.Gates(eta, alpha), rule=rule, at_edge=True,
    chunk_free=True, run=memory.Run("xla", policy=policy),
  )  # fmt: skip
  return y, state.w


def _mlp(correlation: float, rate: float | None, policy: str) -> Any:
  """The same of an MLP memory: l2, both layers erase, proximal rates."""
  keys = jax.random.split(jax.random.key(1), 6)
  shape = _SHAPE[:3]
  rule = memory.Rule(chunk=_CHUNK, residual_clip=4.0)
  params = memory.mlp.init(keys[5], _SHAPE[2], _SHAPE[3], _SHAPE[3])
  k, v = _keys(keys[0], correlation), jax.random.normal(keys[1], _SHAPE)
  q = _keys(keys[2], 0.0)
  eta = jax.nn.sigmoid(jax.random.normal(keys[3], shape))
  eta = eta if rate is None else jnp.full(shape, rate)
  alpha = jax.nn.log_sigmoid(jax.random.normal(keys[4], shape) + 4.0)
  y, state, _ = memory.mlp.update(
    params, memory.chunked.start(params, _SHAPE[0], rule), q, k, v,
    memory.Gates(eta, alpha), rule=rule, at_edge=True, aligned=True,
    run=memory.Run("xla", policy=policy),
  )  # fmt: skip
  return y, state.w


_BODIES = (
  ("gated delta rule", _delta),
  ("delta rule", functools.partial(_delta, decays=False)),
  ("MLP memory", _mlp),
)


def _hope(arch: str, policy: str) -> Any:
  """Self-modifying Titans as the configs have them, random inputs."""
  matrix = dict(
    objective="dot", dgd_coef="raw", residual=False, residual_clip=0.0
  )
  config = self_modifying.Options(
    memory=arch, chunk_memory=_CHUNK, chunk_gen=_CHUNK,
    **(matrix if arch == "linear" else {}),
  )  # fmt: skip
  params = self_modifying.init(jax.random.key(2), config, *_SHAPE[2:])
  z = jax.random.normal(jax.random.key(3), (3, *_SHAPE))
  y, state, _ = self_modifying.update(
    params, self_modifying.start(params, _SHAPE[0], config), *z,
    options=config, at_edge=True, aligned=True,
    run=memory.Run("xla", policy=policy),
  )  # fmt: skip
  return y, (state.generators.w, state.memory.w)


def rows() -> list[tuple[str, str, dict[str, tuple[float, float]]]]:
  """(walk, case, by policy the errors of reads and of the last state)."""
  bodies = [
    (f"{name}", case, functools.partial(body, correlation, rate))
    for name, body in _BODIES
    for case, correlation, rate in CASES
  ]
  bodies += [
    (f"self-modifying Titans, {arch}", "random inputs",
     functools.partial(_hope, arch))
    for arch in ("linear", "mlp")
  ]  # fmt: skip
  made = []
  for name, case, body in bodies:
    run = jax.jit(body, static_argnums=0)
    exact = run("f32")
    errors = {}
    for policy in POLICIES[1:]:
      got = run(policy)
      errors[policy] = (_error(got[0], exact[0]), _error(got[1], exact[1]))
    made.append((name, case, errors))
  return made


def table() -> str:
  """Markdown: largest errors, reads / last state, relative to the largest."""
  assert set(POLICIES) == set(walk.POLICIES)
  lines = [
    f"| walk | keys | {' | '.join(POLICIES[1:])} |",
    "|---|---|" + "---|" * len(POLICIES[1:]),
  ]
  for name, case, errors in rows():
    cells = (f"{y:.1e} / {w:.1e}" for y, w in errors.values())
    lines.append(f"| {name} | {case} | {' | '.join(cells)} |")
  return "\n".join(lines)
