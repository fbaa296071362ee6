"""Self-modifying Titans and the joint token loop (docs/mathematics.md 3.4)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax import memory
from nl_jax.memory import mlp
from nl_jax.memory import self_modifying as sm
from tests.memory import oracle
from tests.memory.test_memories import close

B, T, H, K = 2, 13, 2, 4
DELTA = dict(
  memory="linear", objective="dot", dgd_coef="raw", residual=False,
  residual_clip=0.0,
)  # fmt: skip
FREE = dict(residual_clip=0.0)  # The oracle has no clip.
CONFIGS = {
  "mlp": sm.Options(chunk_memory=4, chunk_gen=4, **FREE),
  "linear": sm.Options(chunk_memory=4, chunk_gen=4, **DELTA),
  "two_chunks": sm.Options(chunk_memory=5, chunk_gen=3, **FREE),
  "all_self": sm.Options(
    chunk_memory=4, chunk_gen=6, value_source="self", value_norm="l2",
    generators=sm.GeneratorOptions(value_norm="l2", rate=1.0), **FREE,
  ),
  "momentum": sm.Options(
    chunk_memory=4, chunk_gen=4, momentum="ema", read="before", hidden=6,
    **FREE,
  ),
  "adaptive_q": sm.Options(
    chunk_memory=4, chunk_gen=4, adaptive_q=True, adaptive=("v", "eta"),
    read="chunk_start", residual_clip=1.0,
  ),
  "glu": sm.Options(memory="glu", chunk_memory=4, chunk_gen=4, **FREE),
}  # fmt: skip


def make(config, seed=0, T=T):
  params = sm.init(jax.random.key(seed), config, H, K)
  noise = lambda x, i: x + 0.2 * jax.random.normal(jax.random.key(i), x.shape)
  leaves, tree = jax.tree.flatten(params)
  leaves = [noise(x, i).astype(float) for i, x in enumerate(leaves)]
  z = jax.random.normal(jax.random.key(seed + 1), (3, B, T, H, K), float)
  return jax.tree.unflatten(tree, leaves), tuple(z)


def run(config, params, z, **options):
  state = sm.start(params, B, config)
  return sm.update(params, state, *z, options=config, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_passes_equal_the_joint_token_loop(name):
  config = CONFIGS[name]
  with jax.enable_x64(True):
    params, z = make(config)
    y, _, _ = jax.jit(lambda p, z: run(config, p, z, at_edge=True))(params, z)
    per_head = jax.vmap(
      lambda p, *z: oracle.self_modifying(config, p, *z), (0, 1, 1, 1), 1
    )
    expected = np.stack(
      [per_head(params, *(x[b] for x in z)) for b in range(B)]
    )
  if config.residual_clip:  # Where it acts they must differ.
    assert np.abs(y - expected).max() > 1e-6
    with jax.enable_x64(True):
      free = dataclasses.replace(config, residual_clip=0.0)
      y, _, _ = run(free, params, z, at_edge=True)
  close(y, expected, 1e-10)


def test_outer_gradient_equals_the_joint_loops():
  config = CONFIGS["two_chunks"]
  with jax.enable_x64(True):
    params, z = make(config)
    params = jax.tree.map(lambda x: x[:1], params)
    z = tuple(x[:1, :8, :1] for x in z)

    def ours(p, z):
      y, _, _ = sm.update(
        p, sm.start(p, 1, config), *z, options=config, at_edge=True
      )
      return jnp.sin(y).sum()

    def theirs(p, z):
      p = jax.tree.map(lambda x: x[0], p)
      y = oracle.self_modifying(config, p, *(x[0, :, 0] for x in z))
      return jnp.sin(y).sum()

    got = jax.jit(jax.grad(ours, (0, 1)))(params, z)
    expected = jax.jit(jax.grad(theirs, (0, 1)))(params, z)
  close(got, expected, 1e-10)


@pytest.mark.parametrize("name", ["mlp", "two_chunks", "linear", "momentum"])
def test_every_initial_memory_gets_a_gradient(name):
  """M_k, M_v, M_eta and M_alpha too: what public codes leave dead."""
  config = CONFIGS[name]
  with jax.enable_x64(True):
    params, z = make(config)
    loss = lambda p: jnp.sin(run(config, p, z, at_edge=True)[0]).sum()
    grads = jax.jit(jax.grad(loss))(params)
  for path, g in jax.tree_util.tree_leaves_with_path(grads):
    assert (g != 0).all(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["two_chunks", "momentum"])
def test_any_split_equals_one_call(name):
  config = CONFIGS[name]
  with jax.enable_x64(True):
    params, z = make(config)
    step = jax.jit(
      lambda state, z: sm.update(params, state, *z, options=config)[:2]
    )
    start = sm.start(params, B, config)
    whole, end = step(start, z)
    for cuts in ((4,), tuple(range(1, T))):
      state, parts = start, []
      for a, b in zip((0, *cuts), (*cuts, T)):
        y, state = step(state, tuple(x[:, a:b] for x in z))
        parts.append(y)
      close((np.concatenate(parts, 1), state), (whole, end), 1e-10)


def test_frozen_identity_generators_are_titans():
  """w_out = 0 and no writes: an ordinary memory with gates read from z^k."""
  config = dataclasses.replace(
    CONFIGS["mlp"], generators=sm.GeneratorOptions(rate=0.0)
  )
  with jax.enable_x64(True):
    params, (zq, zk, zv) = make(config)
    for role in config.generator_roles:
      params[role] = dict(
        params[role], w_out=jnp.zeros_like(params[role]["w_out"])
      )
    y, _, _ = run(config, params, (zq, zk, zv), at_edge=True)
    gate = params["gate"]
    logit = lambda n: (
      jnp.einsum("bthk,hk->bth", zk, gate[f"w_{n}"])
      + gate[f"b_{n}"][None, None]
    )
    gates = memory.Gates(
      jax.nn.sigmoid(logit("eta")), jax.nn.log_sigmoid(logit("alpha"))
    )
    unit = lambda x: x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
    rule = config.memory_rule
    titans, _, _ = mlp.update(
      params["memory"], memory.chunked.start(params["memory"], B, rule),
      unit(zq), unit(zk), zv, gates, rule=rule, at_edge=True,
    )  # fmt: skip
  close(y, titans, 1e-10)


def test_rate_moves_the_generators_writes_only():
  rates = []
  for rate in (0.0, 0.1, 1.0):
    config = dataclasses.replace(
      CONFIGS["mlp"], generators=sm.GeneratorOptions(rate=rate)
    )
    params, z = make(config)
    _, state, _ = run(config, params, z, at_edge=True)
    moved = jax.tree.map(lambda w: jnp.abs(w).max(), state.generators.w)
    rates.append(float(max(jax.tree.leaves(moved))))
  assert rates[0] < 1e-6 < rates[1] < rates[2]


def test_gates_of_a_channel_run_on_the_reference_only():
  config = dataclasses.replace(CONFIGS["mlp"], gate_shape="channel")
  params, z = make(config)
  with pytest.raises(ValueError, match="reference"):
    run(config, params, z)
  y, _, _ = run(config, params, z, run=memory.Run("reference"))
  # Equal gates in all channels are the gates of a head.
  flat = dict(params, gate=dict(params["gate"]))
  for name in ("eta", "alpha"):
    flat["gate"][f"w_{name}"] = jnp.zeros_like(params["gate"][f"w_{name}"])
    bias = params["gate"][f"b_{name}"]
    flat["gate"][f"b_{name}"] = jnp.broadcast_to(bias[:, :1], bias.shape)
  head = dict(flat, gate=dict(flat["gate"]))
  for name in ("eta", "alpha"):
    head["gate"][f"b_{name}"] = flat["gate"][f"b_{name}"][:, 0]
  channel, _, _ = run(config, flat, z, run=memory.Run("reference"))
  scalar, _, _ = run(CONFIGS["mlp"], head, z)
  close(channel, scalar, 1e-5)
  assert np.abs(np.asarray(y - channel)).max() > 1e-3


def test_static_gates_take_the_place_of_memories():
  config = dataclasses.replace(
    CONFIGS["mlp"], gate_source="static", adaptive=("k", "v")
  )
  params, z = make(config)
  assert "gate" not in params
  logits = jax.random.normal(jax.random.key(5), (2, B, T, H))
  y, _, _ = run(config, params, z, static_gates=tuple(logits))
  y2, _, _ = run(config, params, z, static_gates=tuple(logits + 1.0))
  assert np.abs(np.asarray(y - y2)).max() > 1e-4
  with pytest.raises(ValueError, match="static_gates=None do not fit"):
    run(config, params, z)


@pytest.mark.parametrize("arch", ["linear", "mlp"])
@pytest.mark.parametrize("stream", ["random", "constant", "repeated"])
def test_state_stays_bounded(arch, stream):
  """16k tokens at the start's default gates: norms below 10x the start's."""
  config = sm.Options(**(DELTA if arch == "linear" else {}))
  heads, key_dim, tokens = 2, 16, 16384
  params = sm.init(jax.random.key(0), config, heads, key_dim)
  z = jax.random.normal(jax.random.key(1), (3, 1, tokens, heads, key_dim))
  if stream == "constant":
    z = jnp.broadcast_to(z[:, :, :1], z.shape)
  if stream == "repeated":
    z = jnp.repeat(z[:, :, : tokens // 16], 16, axis=2)
  start = sm.start(params, 1, config)
  _, state, _ = jax.jit(
    lambda z: sm.update(params, start, *z, options=config, at_edge=True)
  )(tuple(z))
  generators = sm.lay(params, config)
  for before, after in (
    (params["memory"], state.memory),
    (generators, state.generators),
  ):
    norm = lambda w: float(
      jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(w)))
    )
    absolute = jax.tree.map(lambda p, d: p + d[0], dict(before), after.w)
    assert np.isfinite(norm(absolute))
    assert norm(absolute) < 10 * norm(before)


@pytest.mark.parametrize("change,message", [
  (dict(memory="cubic"), "model.mixer.memory must be one of"),
  (dict(adaptive=("k", "w")), r"model.mixer.adaptive\[1\] must be one of"),
  (dict(gate_source="static"), "take them out of model.mixer.adaptive"),
  (dict(momentum="sum", **DELTA), "amplifies what it erases"),
  (dict(eta_max=0.0), "eta_max must be a number above 0"),
  (dict(read="soon"), "model.mixer.read must be one of"),
  (dict(memory="linear", residual=False, value_source="self",
        retention_target="zero"), "learns nothing"),
])  # fmt: skip
def test_configs_that_cannot_work_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    sm.Options(**change)
