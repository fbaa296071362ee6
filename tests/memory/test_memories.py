"""Laws of single memories (docs/architecture.md 5)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax import memory
from nl_jax.kernels import walk
from nl_jax.memory import linear, mlp, objectives
from tests.memory import oracle

B, T, H, K = 2, 13, 2, 4
ARCHS = ("linear", "mlp", "mlp_ln", "glu")
RULES = {
  "default": memory.Rule(chunk=4),
  "delta": memory.Rule(chunk=4, objective="dot", dgd_coef="raw"),
  "titans": memory.Rule(
    chunk=4, dgd_scope="none", momentum="sum", retention_target="zero"
  ),
  "ema": memory.Rule(chunk=3, momentum="ema", read="before"),
  "eq88": memory.Rule(
    chunk=5, dgd_scope="input_layer", dgd_coef="raw", erase_of="whole"
  ),
  "eq90": memory.Rule(chunk=4, read="chunk_start", retention_target="zero"),
  "huber": memory.Rule(chunk=4, objective="huber", inner_mean=True),
  "huber_norm": memory.Rule(chunk=1, objective="huber_norm"),
  # Windows within a chunk, over several of them, and longer than any call.
  "omega": memory.Rule(chunk=4, momentum="ema", omega=3),
  "omega_long": memory.Rule(
    chunk=3,
    momentum="sum",
    dgd_scope="none",
    retention_target="zero",
    read="before",
    omega=8,
  ),
  "omega_all": memory.Rule(
    chunk=4,
    omega=20,
    dgd_scope="input_layer",
    dgd_coef="raw",
    erase_of="whole",
    read="chunk_start",
  ),
}


def module(arch, residual=True):
  """(init, update) of an architecture, with one signature."""
  if arch == "linear":
    init = lambda key: linear.init(key, H, K, K, std=0.3)
    return init, functools.partial(linear.update, residual=residual)
  init = lambda key: mlp.init(key, H, K, 6, arch=arch, out_std=0.3)
  return init, functools.partial(mlp.update, arch=arch, residual=residual)


def inputs(rule, seed=0, T=T):
  keys = iter(jax.random.split(jax.random.key(seed), 8))
  draw = lambda *shape: jax.random.normal(next(keys), (B, T, H, *shape))
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  gates = memory.Gates(
    eta=jax.nn.sigmoid(draw()),
    log_alpha=jax.nn.log_sigmoid(draw() + 2),
    log_beta=jax.nn.log_sigmoid(draw()) if rule.has_momentum else None,
  )
  if rule.omega > 1:
    gates = gates._replace(gamma=jax.nn.sigmoid(draw()))
  return unit(draw(K)), unit(draw(K)), draw(K), gates


def close(x, y, tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * max(1.0, float(np.abs(b).max()))
    ),
    x, y,
  )  # fmt: skip


def by_oracle(arch, rule, params, q, k, v, gates, ids=None):
  """The oracle, row by row; heads in parallel."""

  def row(b):
    beta = gates.log_beta
    run = lambda p, xs: oracle.memory(
      arch, True, rule, p, *xs[:-1], None if ids is None else ids[b], xs[-1]
    )[0]
    xs = [q, k, v, gates.eta, jnp.exp(gates.log_alpha)]
    xs += [None if beta is None else jnp.exp(beta), gates.gamma]
    heads = jax.vmap(run, (0, 1), 1)
    return heads(params, jax.tree.map(lambda x: x[b], xs))

  return np.stack([row(b) for b in range(B)])


CASES = [(arch, name) for arch in ("linear", "mlp") for name in RULES]
CASES += [
  (arch, name) for arch in ("mlp_ln", "glu") for name in ("ema", "eq88")
]


@pytest.mark.versions
@pytest.mark.parametrize("arch,name", CASES)
def test_chunked_equals_the_definition(arch, name):
  rule = RULES[name]
  with jax.enable_x64(True):
    init, update = module(arch)
    params = jax.tree.map(lambda w: w.astype(float), init(jax.random.key(1)))
    q, k, v, gates = inputs(rule)
    run = jax.jit(
      lambda p, fresh: update(
        p, memory.chunked.start(p, B, rule), q, k, v, gates,
        rule=rule, at_edge=fresh,
      ),
      static_argnums=1,
    )  # fmt: skip
    y, state, metrics = run(params, True)
    y2, state2, _ = run(params, False)
    expected = by_oracle(arch, rule, params, q, k, v, gates)
  close(y, expected, 1e-10)
  close((y2, state2), (y, state), 1e-10)
  assert (np.asarray(state.phase) == T % rule.chunk).all()
  assert (np.asarray(metrics.count) == T).all()


@pytest.mark.parametrize("arch,name", [
  *((arch, "default") for arch in ARCHS),
  ("mlp", "omega"), ("linear", "omega_long"), ("glu", "omega_all"),
])  # fmt: skip
def test_documents_anywhere_in_a_chunk(arch, name):
  rule = RULES[name]
  ids = np.array([[1] * 6 + [2] * 7, [3, 3, 3, 0, 5, 5, 0, 6, 6, 6, 6, 6, 0]])
  with jax.enable_x64(True):
    init, update = module(arch)
    params = jax.tree.map(lambda w: w.astype(float), init(jax.random.key(1)))
    q, k, v, gates = inputs(rule)
    y, state, _ = update(
      params, memory.chunked.start(params, B, rule), q, k, v, gates,
      rule=rule, segment_ids=jnp.asarray(ids),
    )  # fmt: skip
    expected = by_oracle(arch, rule, params, q, k, v, gates, ids)
  real = (ids != 0)[:, :, None, None]
  close(np.where(real, y, 0), np.where(real, expected, 0), 1e-10)
  assert (np.asarray(state.segment) == [2, 6]).all()


@pytest.mark.parametrize(
  "name", ["default", "ema", "eq90", "omega", "omega_long"]
)
@pytest.mark.parametrize("cuts", [(5,), (1, 2, 3), (4, 8), tuple(range(1, T))])
def test_any_split_equals_one_call(name, cuts):
  rule = RULES[name]
  with jax.enable_x64(True):
    init, update = module("mlp")
    params = jax.tree.map(lambda w: w.astype(float), init(jax.random.key(1)))
    args = inputs(rule)
    step = jax.jit(
      lambda state, args: update(params, state, *args, rule=rule)[:2]
    )
    start = memory.chunked.start(params, B, rule)
    whole, end = step(start, args)
    state, parts = start, []
    for a, b in zip((0, *cuts), (*cuts, T)):
      part = jax.tree.map(lambda x: x[:, a:b], args)  # noqa: B023
      y, state = step(state, part)
      parts.append(y)
  close((np.concatenate(parts, 1), state), (whole, end), 1e-10)


@pytest.mark.parametrize("name", ["ema", "omega", "omega_long"])
def test_rows_out_of_step_and_padding(name):
  """Rows that stop at different tokens continue as if they were alone."""
  rule = RULES[name]
  with jax.enable_x64(True):
    init, update = module("mlp")
    params = jax.tree.map(lambda w: w.astype(float), init(jax.random.key(1)))
    args = inputs(rule)
    start = memory.chunked.start(params, B, rule)
    whole, end, _ = update(params, start, *args, rule=rule)
    lengths, state = [5, 8], start
    ids = jnp.arange(8)[None] < jnp.asarray(lengths)[:, None]
    first = jax.tree.map(lambda x: x[:, :8], args)
    poisoned = jax.tree.map(
      lambda x: jnp.where(ids.reshape(B, 8, *(1,) * (x.ndim - 2)), x, jnp.nan),
      first,
    )
    y, state, _ = update(
      params, state, *poisoned, rule=rule, segment_ids=ids.astype(int)
    )
    for b, n in enumerate(lengths):
      close(y[b, :n], whole[b, :n], 1e-10)
    rest = jax.tree.map(
      lambda x: jnp.stack(
        [jnp.pad(x[b, n:], [(0, n - 5), *[(0, 0)] * (x.ndim - 2)])
         for b, n in enumerate(lengths)]
      ), args,
    )  # fmt: skip
    ids = jnp.arange(8)[None] < (T - jnp.asarray(lengths))[:, None]
    y, state, _ = update(
      params, state, *rest, rule=rule, segment_ids=ids.astype(int)
    )
  for b, n in enumerate(lengths):
    close(y[b, : T - n], whole[b, n:], 1e-10)
  close(state, end, 1e-10)


@pytest.mark.parametrize("name", ["default", "omega_long"])
def test_a_call_that_begins_a_document_begins_at_an_edge(name):
  rule = RULES[name]
  with jax.enable_x64(True):
    init, update = module("mlp")
    params = jax.tree.map(lambda w: w.astype(float), init(jax.random.key(1)))
    args = inputs(rule)
    start = memory.chunked.start(params, B, rule)
    alone, end, _ = update(
      params, start, *args, rule=rule, segment_ids=jnp.full((B, T), 2)
    )
    for before in (1, 3, 4, 6):
      part = jax.tree.map(lambda x: x[:, :before], args)  # noqa: B023
      _, state, _ = update(params, start, *part, rule=rule)
      y, state, _ = update(
        params, state, *args, rule=rule, segment_ids=jnp.full((B, T), 2)
      )
      close((y, state), (alone, end), 1e-10)


@pytest.mark.parametrize("omega", [1, 3])
def test_outer_gradient_equals_the_token_loops(omega):
  """Through all writes; and remat groups change nothing."""
  rule = memory.Rule(chunk=4, momentum="ema", omega=omega)
  with jax.enable_x64(True):
    init, update = module("mlp")
    params = jax.tree.map(lambda w: w.astype(float), init(jax.random.key(1)))
    q, k, v, gates = jax.tree.map(lambda x: x[:1, :9, :1], inputs(rule))
    params = jax.tree.map(lambda w: w[:1], params)

    def ours(args, group):
      now = dataclasses.replace(rule, remat_group=group)
      p, *rest = args
      start = memory.chunked.start(p, 1, now)
      return jnp.sin(update(p, start, *rest, rule=now, at_edge=True)[0]).sum()

    def theirs(args):
      p, q, k, v, gates = jax.tree.map(lambda x: x, args)
      row = lambda x: x[0, :, 0]
      y, _ = oracle.memory(
        "mlp", True, rule, jax.tree.map(lambda w: w[0], p), row(q), row(k),
        row(v), row(gates.eta), row(jnp.exp(gates.log_alpha)),
        row(jnp.exp(gates.log_beta)),
        gamma=None if gates.gamma is None else row(gates.gamma),
      )  # fmt: skip
      return jnp.sin(y).sum()

    args = (params, q, k, v, gates)
    expected = jax.jit(jax.grad(theirs))(args)
    for group in (1, 3):
      got = jax.jit(jax.grad(ours), static_argnums=1)(args, group)
      close(got, expected, 1e-10)


@pytest.mark.versions
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
def test_pairs_are_the_inner_gradient(arch, objective):
  with jax.enable_x64(True):
    init, _ = module(arch)
    params = jax.tree.map(lambda w: w.astype(float), init(jax.random.key(1)))
    rule = memory.Rule(objective=objective)
    _, k, v, _ = inputs(rule)
    k, v = (jnp.swapaxes(x, 1, 2)[:1] for x in (k, 3.0 * v))
    w = jax.tree.map(lambda x: x[None], params)
    forward = linear.forward_residual if arch == "linear" else mlp.forward(arch)
    ones = jnp.ones((1, H, 1, 1))
    at = walk.At(
      jnp.ones((1, H, T, 1)), None, 0 * ones, 0 * ones, ones, None, walk.Tile()
    )
    still = jax.tree.map(jnp.zeros_like, w)
    block = memory.rule.Block(w, still, {}, {}, at)
    u, delta, terms = memory.rule.pairs(forward, block, k, v, rule)
    kinds = objectives.OBJECTIVES[objective]

    def total(w, t):
      y = forward(lambda n, x: x @ w[n], k[:, :, t : t + 1])
      return kinds.terms(y, v[:, :, t : t + 1]).sum()

    for t in (0, 5):
      expected = jax.grad(total)(w, t)
      got = {n: u[n][:, :, t, :, None] * delta[n][:, :, t, None, :] for n in u}
      # lp smooths sign and absolute value: its error is not quite a gradient.
      close(got, expected, 1e-3 if objective == "lp" else 1e-10)
      np.testing.assert_allclose(terms[:, :, t].sum(), total(w, t), rtol=1e-10)


def test_residual_clip_bounds_the_error_and_its_gradient():
  x = jnp.zeros((1, 4))
  assert (objectives.clip_norm(x, 1.0) == 0).all()
  grad = jax.grad(lambda x: objectives.clip_norm(x, 1.0).sum())(x)
  np.testing.assert_allclose(grad, 1.0)
  long = objectives.clip_norm(jnp.full((1, 4), 7.0), 0.5)
  np.testing.assert_allclose(jnp.linalg.norm(long), 0.5, rtol=1e-6)


def test_stop_grad_writes_keeps_values_and_cuts_the_past():
  rule = memory.Rule(chunk=4)
  cut = dataclasses.replace(rule, stop_grad_writes=True)
  init, update = module("mlp")
  params = init(jax.random.key(1))
  q, k, v, gates = inputs(rule)

  def last(v, rule):
    start = memory.chunked.start(params, B, rule)
    y, _, _ = update(params, start, q, k, v, gates, rule=rule, at_edge=True)
    return y[:, -1].sum(), y

  (_, y), grad = jax.value_and_grad(last, has_aux=True)(v, rule)
  (_, y2), cut_grad = jax.value_and_grad(last, has_aux=True)(v, cut)
  np.testing.assert_array_equal(y, y2)
  assert (grad[:, 0] != 0).any() and (cut_grad[:, :12] == 0).all()
  assert (cut_grad[:, 12] != 0).any()


def test_read_sees_the_present_weights():
  rule = memory.Rule(chunk=4)
  init, update = module("mlp")
  params = init(jax.random.key(1))
  q, k, v, gates = inputs(rule)
  start = memory.chunked.start(params, B, rule)
  y, state, _ = update(params, start, q, k, v, gates, rule=rule)
  got = mlp.read(params, state, q[:, -1:])
  np.testing.assert_allclose(got, y[:, -1:], atol=1e-5)


@pytest.mark.parametrize("objective,erase_of,fixed", [
  ("l2", "whole", 0.5), ("dot", "whole", 1.0),
])  # fmt: skip
def test_fixed_points_of_a_repeated_pair(objective, erase_of, fixed):
  """l2 + DGD recalls v / 2, dot + DGD recalls v (docs/mathematics.md 2.8)."""
  rule = memory.Rule(
    chunk=4, objective=objective, dgd_coef="raw", erase_of=erase_of,
    retention_target="zero",
  )  # fmt: skip
  params = {"w": jnp.zeros((1, K, K))}
  k = jnp.tile(jnp.eye(K)[0], (1, 400, 1, 1))
  v = jnp.tile(jnp.arange(1.0, K + 1), (1, 400, 1, 1))
  ones = jnp.ones((1, 400, 1))
  gates = memory.Gates(0.2 * ones, 0.0 * ones)
  start = memory.chunked.start(params, 1, rule)
  y, _, _ = linear.update(params, start, k, k, v, gates, rule=rule)
  np.testing.assert_allclose(y[0, -1], fixed * v[0, -1], rtol=1e-4)


def test_contraction_of_a_repeated_key_is_the_closed_form():
  """2 (1 - eta)^C - 1 a chunk, l2 + DGD, alpha 1 (docs/mathematics.md 2.8)."""
  C, eta = 8, 0.1
  rule = memory.Rule(
    chunk=C, dgd_coef="raw", erase_of="whole", retention_target="zero"
  )
  params = {"w": jax.random.normal(jax.random.key(0), (1, K, K))}
  k = jnp.tile(jnp.eye(K)[0], (1, 2 * C, 1, 1))
  zero = jnp.zeros((1, 2 * C, 1))
  start = memory.chunked.start(params, 1, rule)
  _, state, _ = linear.update(
    params, start, k, k, 0.0 * k, memory.Gates(zero + eta, zero), rule=rule
  )
  factor = (2 * (1 - eta) ** C - 1) ** 2
  np.testing.assert_allclose(
    (params["w"] + state.w["w"][0])[0, 0], factor * params["w"][0, 0], rtol=1e-4
  )


def test_dot_memories_do_not_depend_on_the_chunk():
  with jax.enable_x64(True):
    init, update = module("linear", residual=False)
    params = jax.tree.map(lambda w: w.astype(float), init(jax.random.key(1)))
    reads = []
    for chunk in (1, 4, 16):
      rule = memory.Rule(chunk=chunk, objective="dot", dgd_coef="raw")
      args = inputs(rule)
      start = memory.chunked.start(params, B, rule)
      reads.append(update(params, start, *args, rule=rule)[0])
  close(reads[1:], [reads[0]] * 2, 1e-10)


def test_a_window_of_closed_gates_is_none():
  """Limit: where gamma is 1 every C-th token alone, its write is plain's."""
  with jax.enable_x64(True):
    init, update = module("mlp")
    params = jax.tree.map(lambda w: w.astype(float), init(jax.random.key(1)))
    off, on = memory.Rule(chunk=4), memory.Rule(chunk=4, omega=3)
    q, k, v, gates = inputs(off)
    # One token in three learns; what it left behind has no rate afterwards.
    learns = (jnp.arange(T) % 3 == 0)[None, :, None]
    gates = gates._replace(eta=jnp.where(learns, gates.eta, 0.0))
    y, _, plain = update(
      params, memory.chunked.start(params, B, off), q, k, v, gates, rule=off
    )
    ones = gates._replace(gamma=jnp.where(learns, 1.0, 0.0) + 0 * gates.eta)
    y2, _, metrics = update(
      params, memory.chunked.start(params, B, on), q, k, v, ones, rule=on
    )
  close((y2, metrics), (y, plain), 1e-6)
  close(y2, y, 1e-10)


def test_momentum_off_is_beta_zero():
  with jax.enable_x64(True):
    init, update = module("mlp")
    params = jax.tree.map(lambda w: w.astype(float), init(jax.random.key(1)))
    off, on = memory.Rule(chunk=4), memory.Rule(chunk=4, momentum="sum")
    q, k, v, gates = inputs(off)
    y, _, _ = update(
      params, memory.chunked.start(params, B, off), q, k, v, gates, rule=off
    )
    still = gates._replace(log_beta=jnp.full((B, T, H), -1e3))
    y2, _, _ = update(
      params, memory.chunked.start(params, B, on), q, k, v, still, rule=on
    )
  close(y2, y, 1e-10)


def test_mistakes_are_told():
  with pytest.raises(ValueError, match="model.mixer.objective must be one of"):
    memory.Rule(objective="l3")
  with pytest.raises(ValueError, match="chunk must be a whole number from 1"):
    memory.Rule(chunk=0)
  with pytest.raises(ValueError, match="omega must be a whole number from 1"):
    memory.Rule(omega=0)
  with pytest.raises(ValueError, match="model.mixer.memory must be one of"):
    mlp.forward("deep")
  rule = memory.Rule(momentum="ema")
  init, update = module("mlp")
  params = init(jax.random.key(0))
  q, k, v, gates = inputs(memory.Rule())
  with pytest.raises(ValueError, match="log_beta do not fit"):
    start = memory.chunked.start(params, B, rule)
    update(params, start, q, k, v, gates, rule=rule)
  rule = memory.Rule(omega=2)
  with pytest.raises(ValueError, match="omega=2 and no gates.gamma do not fit"):
    start = memory.chunked.start(params, B, rule)
    update(params, start, q, k, v, gates, rule=rule)


def test_gates_of_a_channel_lie_along_the_channels_of_a_layer():
  """Also where a layer is as wide as it is deep."""
  K = 4
  params = mlp.init(jax.random.key(0), 2, K, K, in_std=0.5, out_std=0.5)
  q, k, v = jax.random.normal(jax.random.key(1), (3, 1, 6, 2, K))
  eta = jnp.full((1, 6, 2, K), 0.3).at[..., 1].set(0.0)
  rule = memory.Rule(chunk=4)
  _, state, _ = mlp.update(
    params, mlp.start(params, 1, rule), q, k, v,
    memory.Gates(eta, jnp.zeros_like(eta)),
    rule=rule, run=memory.Run("reference"),
  )  # fmt: skip
  w_in, w_out = np.abs(state.w["w_in"]), np.abs(state.w["w_out"])
  assert w_in[:, :, 1].max() < 1e-6 < w_in.min(axis=(0, 1, 3))[[0, 2, 3]].min()
  assert w_out[..., 1].max() < 1e-6
  assert w_out.min(axis=(0, 1, 2))[[0, 2, 3]].min() > 1e-6
