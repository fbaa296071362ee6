"""Atlas' inner Muon against token loops, its limits, and in calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax import memory
from nl_jax.memory import linear, muon
from nl_jax.models import lm
from nl_jax.models.mixers.titans import lmm as titans
from tests.memory import oracle, test_memories
from tests.memory.test_memories import B, H, K, close

T = 9

RULES = {
  "ema": memory.Rule(
    chunk=4, momentum="ema", dgd_scope="none", inner_muon="chunk"
  ),
  "sum": memory.Rule(
    chunk=3, momentum="sum", dgd_scope="none", inner_muon="chunk",
    retention_target="zero", erase_of="whole", objective="huber", omega=2,
    read="before",
  ),
  "token": memory.Rule(
    chunk=4, momentum="ema", dgd_scope="none", inner_muon="token"
  ),
}  # fmt: skip
IDS = np.array([[1, 1, 0, 2, 2, 2, 2, 2, 0], [3] * T])


def newton_schulz(S):
  """Five steps on the short side, by hand."""
  X = S / (jnp.linalg.norm(S) + 1e-12)
  X = X.T if S.shape[0] > S.shape[1] else X
  for a, b, c in muon.COEFFICIENTS:
    A = X @ X.T
    X = a * X + (b * A + c * A @ A) @ X
  return X.T if S.shape[0] > S.shape[1] else X


def loop(arch, rule, params, q, k, v, eta, alpha, beta, ids, gamma):
  """One head of one row, by autodiff: reads [T, V] and the weights."""
  of = lambda V, k, v: oracle.loss(
    rule.objective, oracle.forward(arch, True, V, k), v
  )
  total = lambda V, seen: sum(g * of(V, *x) for g, *x in seen)
  keep = 1.0 if rule.retention_target == "init" else 0.0
  W = anchor = params
  rest = jax.tree.map(lambda w: keep * w, params)
  S = jax.tree.map(jnp.zeros_like, W)
  reads, seen, document, rate = [], [], ids[ids != 0][0], 0.0
  for t in range(len(q)):
    if ids[t] not in (0, document):
      document, seen, W, anchor = ids[t], [], params, params
      S = jax.tree.map(jnp.zeros_like, W)
    before = W
    if ids[t]:
      one = 1.0 if gamma is None else gamma[t]
      seen = [*seen, (one, k[t], v[t])][-rule.omega :]
      G, rate = jax.grad(total)(anchor, seen), eta[t]
      c = rate * (1 - beta[t]) if rule.momentum == "ema" else rate
      S = jax.tree.map(lambda s, g, t=t, c=c: beta[t] * s - c * g, S, G)
      a = alpha[t]
      W = jax.tree.map(lambda w, r, a=a: a * w + (1 - a) * r, W, rest)
      if rule.inner_muon == "token":
        W = jax.tree.map(lambda w, s, e=rate: w + e * newton_schulz(s), W, S)
    reads.append(
      oracle.forward(arch, True, W if rule.read == "after" else before, q[t])
    )
    if (t + 1) % rule.chunk == 0:
      if rule.inner_muon == "chunk":
        W = jax.tree.map(lambda w, s, e=rate: w + e * newton_schulz(s), W, S)
      anchor = W
  return jnp.stack(reads)


def by_loop(arch, rule, params, q, k, v, gates, ids):
  def row(params, xs, b):
    run = lambda p, xs: loop(arch, rule, p, *xs[:-1], ids[b], xs[-1])
    return jax.vmap(run, (0, 1), 1)(params, xs)

  row, beta = jax.jit(row, static_argnums=2), jnp.exp(gates.log_beta)
  xs = [q, k, v, gates.eta, jnp.exp(gates.log_alpha), beta, gates.gamma]
  one = lambda b: row(params, jax.tree.map(lambda x: x[b], xs), b)
  return np.stack([one(b) for b in range(B)])


def case(arch, rule, seed=0):
  init, update = test_memories.module(arch)
  params = jax.tree.map(lambda w: w.astype(float), init(jax.random.key(1)))

  def run(params, state, x, ids=None, at_edge=False):
    return update(
      params, state, *x, rule=rule, segment_ids=ids, at_edge=at_edge
    )[:2]

  run = jax.jit(run, static_argnames="at_edge")
  return params, run, test_memories.inputs(rule, seed, T)


@pytest.mark.parametrize("arch,name", [
  ("mlp", "ema"), ("linear", "sum"), ("linear", "token"),
])  # fmt: skip
def test_it_is_the_token_loop_with_documents_and_padding(arch, name):
  rule = RULES[name]
  with jax.enable_x64(True):
    params, run, x = case(arch, rule)
    y, _ = run(params, memory.chunked.start(params, B, rule), x, IDS)
    expected = by_loop(arch, rule, params, *x, IDS)
  real = IDS != 0
  close(np.asarray(y)[real], expected[real], 1e-9)


def test_any_split_is_one_call():
  rule = RULES["sum"]
  with jax.enable_x64(True):
    params, run, x = case("linear", rule)
    begin = memory.chunked.start(params, B, rule)
    y, end = run(params, begin, x, at_edge=True)
    state, parts = begin, []
    for a, b in ((0, 3), (3, 4), (4, T)):
      cut = jax.tree.map(lambda z, a=a, b=b: z[:, a:b], x)
      part, state = run(params, state, cut)
      parts.append(part)
  close(np.concatenate(parts, 1), y, 1e-10)
  close(state, end, 1e-10)


def test_a_chunk_of_one_token_is_the_rule_of_a_token():
  with jax.enable_x64(True):
    one = dataclasses.replace(RULES["ema"], chunk=1, read="before")
    params, run, x = case("linear", one)
    start = memory.chunked.start(params, B, one)
    y, state = run(params, start, x)
    token = dataclasses.replace(one, inner_muon="token")
    _, loop, _ = case("linear", token)
    same, last = loop(params, memory.chunked.start(params, B, token), x)
  close(y, same, 1e-10)
  close(state.w, last.w, 1e-10)


def test_weights_move_at_chunk_ends_by_an_orthogonal_matrix():
  """alpha = 1: nothing inside a chunk, then eta of its last token."""
  rule = dataclasses.replace(RULES["ema"], chunk=8)
  with jax.enable_x64(True):
    params, run, (q, k, v, gates) = case("linear", rule)
    gates = gates._replace(log_alpha=0 * gates.log_alpha)
    cut = lambda n: jax.tree.map(lambda z: z[:, :n], (q, k, v, gates))
    state = memory.chunked.start(params, B, rule)
    still = run(params, state, cut(7))[1].w["w"] - state.w["w"]
    moved = run(params, state, cut(8))[1].w["w"] - state.w["w"]
  assert not np.asarray(still).any()
  sizes = np.linalg.svd(np.asarray(moved), compute_uv=False)
  assert sizes.shape == (B, H, K)
  ratio = sizes / np.asarray(gates.eta)[:, 7][..., None]
  assert (ratio < 1.2).all() and (ratio[..., 0] > 0.9).all()


def test_without_a_rate_it_only_decays():
  rule = RULES["ema"]
  params, run, (q, k, v, gates) = case("linear", rule)
  params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
  gates = gates._replace(eta=0 * gates.eta)
  state = memory.chunked.start(params, B, rule)
  _, state = run(params, state, (q, k, v, gates))
  for name, w in state.w.items():
    np.testing.assert_allclose(w, 0, atol=1e-6, err_msg=name)
  total = lambda p, s: run(p, s, (q, k, v, gates))[0].sum()
  grad = jax.jit(jax.grad(total))(params, state)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


@pytest.mark.parametrize("change,message", [
  (dict(momentum="off"), "set model.mixer.momentum to 'ema' or 'sum'"),
  (dict(dgd_scope="per_layer"), "set model.mixer.dgd_scope to 'none'"),
  (dict(inner_muon="chunks"), "inner_muon must be one of off, chunk, token"),
])  # fmt: skip
def test_switches_that_do_not_fit_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(RULES["ema"], **change)


def test_rows_without_it_say_so():
  for arch in ("memora", "dla"):
    with pytest.raises(ValueError, match="inner_muon='chunk' makes momentum"):
      lm.options(arch, dict(inner_muon="chunk"))
  with pytest.raises(ValueError, match="has no model.mixer.inner_muon"):
    lm.options("hope", dict(inner_muon="chunk"))
  assert "by Muon" in titans.rule_name(titans.Options(inner_muon="chunk"))


def test_the_chunk_form_has_no_muon_at_every_token():
  rule = RULES["token"]
  params, _, x = case("linear", rule)
  state = memory.chunked.start(params, B, rule)
  with pytest.raises(ValueError, match="inner_muon='token' has no chunk form"):
    linear.update(
      params, state, *x, rule=rule, residual=True, run=memory.Run("xla")
    )
