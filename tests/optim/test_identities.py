"""Identities (docs/mathematics.md 10.10) and fixture F, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nl_jax import optim


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


def _tree(t, shapes=None):
  shapes = shapes or {"w": (6, 4), "stack": (2, 3, 5), "b": (4,)}
  rng = np.random.default_rng(t)
  return {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}


def _run(tx, steps=6, shapes=None, scale=1.0):
  """Directions of `steps` random gradients, jitted."""
  state = tx.init(_tree(0, shapes))
  update = jax.jit(tx.update)
  out = []
  for t in range(1, steps + 1):
    g = jax.tree.map(lambda x: scale * x, _tree(t, shapes))
    u, state = update(g, state, _tree(0, shapes))
    out.append(u)
  return out, state


def _close(a, b, tol=1e-12):
  compare = lambda x, y: np.testing.assert_allclose(x, y, tol, tol)
  jax.tree.map(compare, a, b)


def _over(k, tree):
  return jax.tree.map(lambda x: x / k, tree)


def _muon(**kw):
  dims = optax.contrib.MuonDimensionNumbers(0, 1)
  return optax.contrib.scale_by_muon(
    weight_dimension_numbers=lambda p: jax.tree.map(lambda _: dims, p), **kw
  )


# Delta momentum, identities 6-9.

_FORMS = [
  (d, g)
  for d in ("linear", "implicit", "prox", "clip")
  for g in ("matrix", "tensor", "element")
  if (d, g) != ("clip", "matrix")
]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("decay", "granularity"), _FORMS)
def test_6_without_erasing_it_is_trace(decay, granularity, side):
  ours = optim.scale_by_delta_momentum(
    0.9, eta_decay=0.0, decay=decay, granularity=granularity, side=side
  )
  trace = optax.trace(0.9)
  state, other = ours.init(_tree(0)), trace.init(_tree(0))
  for t in range(1, 4):
    u, state = ours.update(_tree(t), state)
    v, other = trace.update(_tree(t), other)
    _close(u, v, 0)


def _paper_objective(m, G):
  """Half squared error of m G^T against I, in the paper's layout."""
  return 0.5 * jnp.sum((m @ G.T - jnp.eye(m.shape[0])) ** 2)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_7_linear_is_a_gradient_step_and_prox_its_minimiser(shape):
  G, m = _tree(1, {"x": shape})["x"], _tree(2, {"x": shape})["x"]
  alpha, eta = 0.8, 0.03

  def one(decay):
    tx = optim.scale_by_delta_momentum(
      alpha, eta, eta, decay=decay, key="raw", side="input"
    )
    state = tx.init(m)._replace(mu=m)
    return tx.update(G, state)[0]

  # Their matrices are (out, in), and their m G^T acts on outputs.
  slope = jax.grad(lambda m: _paper_objective(m.T, G.T))(m)
  _close(one("linear"), alpha * m - eta * slope)
  goal = lambda x: (
    _paper_objective(x.T, G.T) + jnp.sum((x - alpha * m) ** 2) / (2 * eta)
  )
  _close(jax.grad(goal)(one("prox")), jnp.zeros(shape), 1e-11)


@pytest.mark.parametrize("eta_decay", [0.2, 1.0])
def test_8_frobenius_keys_are_stable_and_equivariant(eta_decay):
  G = _tree(1)["w"]
  K = G / jnp.linalg.norm(G)
  alpha = 0.9
  step = alpha * jnp.eye(6) - eta_decay * K @ K.T
  assert jnp.linalg.norm(step, 2) <= max(alpha, eta_decay - alpha) + 1e-12
  tx = optim.scale_by_delta_momentum(alpha, eta_decay=eta_decay)
  for k in (1e-3, 1e3):
    _close(_over(k, _run(tx, scale=k)[0]), _run(tx)[0])


def test_9_constant_vector_has_a_fixed_point():
  g, alpha, eta_decay = jnp.asarray([1.0, -2.0, 0.5]), 0.9, 0.5
  tx = optim.scale_by_delta_momentum(alpha, eta_decay=eta_decay)
  state = tx.init(g)
  for _ in range(200):
    u, state = tx.update(g, state)
  _close(u, g / (1 - alpha + eta_decay))


# Preconditioned and feature momentum, identities 10-11.


def test_10_is_the_chain_of_its_parts():
  P = optim.diag_preconditioner
  chain = optax.chain(P(), optax.trace(0.9))
  _close(_run(optim.scale_by_preconditioned_momentum(P()))[0], _run(chain)[0])
  plain = optim.scale_by_preconditioned_momentum(optax.identity())
  _close(_run(plain)[0], _run(optax.trace(0.9))[0])
  nesterov = optim.scale_by_preconditioned_momentum(
    optax.identity(), nesterov=True
  )
  _close(_run(nesterov)[0], _run(optax.trace(0.9, nesterov=True))[0])


def test_10_diag_is_laprop():
  b2, eps, alpha = 0.999, 1e-8, 0.9
  nu = m = 0.0
  want = []
  for t in range(1, 7):
    g = np.asarray(_tree(t)["w"])
    nu = b2 * nu + (1 - b2) * g**2
    # The bias correction is optax's: a float32 power.
    hat = nu / float(np.float64(1 - jnp.asarray(b2) ** jnp.int32(t)))
    m = alpha * m + g / (np.sqrt(hat) + eps)
    want.append(m)
  tx = optim.scale_by_preconditioned_momentum(
    optim.diag_preconditioner(b2, eps), alpha
  )
  _close([u["w"] for u in _run(tx)[0]], want, 1e-10)


@pytest.mark.parametrize("side", ["input", "output"])
def test_left_gram_is_a_matrix_power(side):
  tx = optim.left_gram_preconditioner(0.9, 1e-3, side=side)
  g = np.asarray(_tree(1)["w"])
  gram = g @ g.T if side == "input" else g.T @ g
  values, Q = np.linalg.eigh(gram + 1e-3 * np.eye(len(gram)))
  root = Q * values**-0.5 @ Q.T
  want = root @ g if side == "input" else g @ root
  u, _ = tx.update(_tree(1), tx.init(_tree(0)))
  _close(u["w"], want, 1e-9)
  _close(u["b"], _tree(1)["b"], 0)


def test_11_features():
  make = optim.scale_by_feature_momentum
  same = make("identity", normalize=None)
  _close(_run(same)[0], _run(optax.trace(0.9))[0])
  sign = make("sign", 0.0, normalize=None)
  _close(_run(sign)[0][-1], jax.tree.map(jnp.sign, _tree(6)))
  ns = make("orthogonalize", 0.0, normalize=None)
  _close(_run(ns)[0][-1]["stack"], optim.orthogonalize(_tree(6)["stack"]))
  rms = jnp.sqrt(jnp.mean(_tree(6)["w"] ** 2))
  tanh = jnp.tanh(_tree(6)["w"] / rms) * rms
  _close(_run(make("tanh", 0.0))[0][-1]["w"], tanh)


# Deep momentum, identities 12-14.


def test_12_linear_memory_is_trace_and_muon():
  linear = dict(memory=optim.LinearMemory())
  tx = optim.scale_by_deep_momentum(0.9, **linear)
  _close(_run(tx)[0], _run(optax.trace(0.9))[0], 0)
  matrices = {"w": (6, 4), "v": (3, 5)}
  ours = optim.scale_by_deep_momentum(0.9, output="orthogonalize", **linear)
  muon = _muon(nesterov=False, beta=0.9)
  _close(_run(ours, shapes=matrices)[0], _run(muon, shapes=matrices)[0], 1e-6)


@pytest.mark.parametrize(
  "kw",
  [
    {"inner_lr": 0.0},
    {"target": "self"},
    {"memory": optim.MLPMemory(hidden=0)},
    {"memory": optim.MLPMemory(hidden=0), "vector_rule": "mlp"},
    {"inner_lr": 0.0, "memory": optim.MLPMemory(depth=1)},
  ],
)
def test_13_limits_are_sgd(kw):
  got, _ = _run(optim.scale_by_deep_momentum(**kw))
  _close(got, [_tree(t) for t in range(1, 7)], 1e-10)


@pytest.mark.parametrize("read", ["pre", "post"])
@pytest.mark.parametrize("depth", [1, 2])
def test_13_first_update_is_the_gradient(read, depth):
  tx = optim.scale_by_deep_momentum(
    read=read, memory=optim.MLPMemory(depth=depth)
  )
  got = _run(tx, 3)[0]
  _close(got[0], _tree(1), 1e-10)
  # The first target is the first gradient: nothing to learn before step 2.
  assert jnp.abs(got[2]["w"] - _tree(3)["w"]).max() > 1e-4


def test_14_is_homogeneous():
  tx = optim.scale_by_deep_momentum(vector_rule="mlp")
  want, memory = _run(tx)
  for k in (1e-3, 1e3):
    got, state = _run(tx, scale=k)
    _close(_over(k, got), want, 1e-9)
    _close(state.memory, memory.memory, 1e-9)


@pytest.mark.parametrize("loss", ["l2", "dot"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "tanh"])
def test_14_inner_gradient_is_that_of_the_stated_loss(
  loss, residual, activation
):
  memory = optim.MLPMemory(hidden=3, residual=residual, activation=activation)
  tx = optim.scale_by_deep_momentum(
    1.0, 0.1, 0.9, memory=memory, inner_step="gd", loss=loss
  )
  act = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "tanh": jnp.tanh}[activation]
  rms = lambda x: x / jnp.sqrt(jnp.mean(x**2))
  state = tx.init(_tree(0))
  update = jax.jit(tx.update)
  for t in (1, 2, 3):
    old = state.memory["w"]
    _, state = update(_tree(t), state)
  u = rms(_tree(3)["w"])
  v = rms(sum(0.9 ** (3 - t) * _tree(t)["w"] for t in (1, 2, 3)))

  def objective(weights):
    y = weights["w_out"].T @ act(weights["w_in"].T @ u) + residual * u
    each = 0.5 * (y - v) ** 2 if loss == "l2" else -y * v
    return jnp.mean(jnp.sum(each, axis=0))

  slope = jax.grad(objective)(old)
  want = jax.tree.map(lambda w, s: w - 0.1 * s, old, slope)
  _close(state.memory["w"], want, 1e-9)


def test_14_a_stacked_memory_is_one_memory_a_layer():
  tx = optim.scale_by_deep_momentum()
  state = tx.init(_tree(0))
  layer = tx.init({"stack": _tree(0)["stack"][1]})
  weights = jax.tree.map(lambda w: w[1], state.memory["stack"])
  layer = layer._replace(memory={"stack": weights})
  update = jax.jit(tx.update)
  for t in range(1, 6):
    u, state = update(_tree(t), state)
    v, layer = update({"stack": _tree(t)["stack"][1]}, layer)
  _close(u["stack"][1], v["stack"])


def test_retention_erases_the_memory():
  run = lambda alpha: _run(optim.scale_by_deep_momentum(alpha), 8)[1].memory
  size = lambda m: float(jnp.linalg.norm(m["w"]["w_out"]))
  assert size(run(0.5)) < size(run(1.0))


# M3, identities 15-20.

_MATRICES = {"w": (6, 4), "v": (3, 5)}


@pytest.mark.parametrize("alpha", [None, 0.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_15_without_slow_memory_it_is_muon(alpha, nesterov):
  ours = optim.scale_by_m3(
    0.95,
    alpha=alpha,
    second_moment=None,
    nesterov=nesterov,
    ns=optim.NewtonSchulz(eps=1e-8),
  )
  muon = _muon(nesterov=nesterov)
  _close(_run(ours, shapes=_MATRICES)[0], _run(muon, shapes=_MATRICES)[0], 2e-6)


def test_16_with_a_slow_memory_every_step_it_is_ademamix():
  ours = optim.scale_by_m3(
    0.9, 0.999, 0.99, 2.0, ns_steps=0, slow_every=1, slow_read="same",
    second_moment="grad",
  )  # fmt: skip
  theirs = optax.contrib.scale_by_ademamix(0.9, 0.999, 0.99, 2.0)
  _close(_run(ours)[0], _run(theirs)[0])


def test_17_without_ns_it_is_adam_or_an_ema():
  kw = dict(alpha=0.0, ns_steps=0)
  adam = optim.scale_by_m3(0.9, 0.999, second_moment="grad", **kw)
  _close(_run(adam)[0], _run(optax.scale_by_adam())[0])
  ema = optim.scale_by_m3(0.9, second_moment=None, **kw)
  _close(_run(ema)[0], _run(optax.ema(0.9))[0])


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_18_scale_invariance_and_the_defect_of_the_printed_form(scale):
  kw = dict(slow_every=2, eps=0.0)
  for kind, power in ((None, 0), ("ortho", 0), ("grad", -1)):
    tx = optim.scale_by_m3(second_moment=kind, **kw)
    got = _over(scale**power, _run(tx, 5, _MATRICES, scale)[0])
    _close(got, _run(tx, 5, _MATRICES)[0], 1e-8)


def test_19_ortho_keeps_the_norm_and_may_be_a_sign():
  kw = dict(alpha=0.5, slow_every=2)
  D = _run(optim.scale_by_m3(second_moment=None, **kw), 6)[0]
  U = _run(optim.scale_by_m3(**kw), 6)[0]
  S = _run(optim.scale_by_m3(b2=0.0, eps=0.0, **kw), 6)[0]
  for d, u, s in zip(D, U, S):
    norm = lambda x: jnp.linalg.norm(x["stack"], axis=(-2, -1))
    _close(norm(u), norm(d), 1e-9)
    _close(jnp.abs(s["w"]), jnp.full((6, 4), jnp.abs(s["w"]).max()), 1e-9)
    _close(jnp.sign(s["w"]), jnp.sign(d["w"]), 0)


def test_20_the_printed_algorithm_step_by_step():
  b1, b2, b3, alpha, eps, f = 0.9, 0.999, 0.8, 0.5, 1e-8, 3
  tx = optim.scale_by_m3(
    b1, b2, b3, alpha, eps, 0, f, accumulate="sum", second_moment="grad",
    chunk_reduce="sum", bias_correction=False,
  )  # fmt: skip
  got, _ = _run(tx, 2 * f + 1)
  g = [np.asarray(_tree(t)["w"]) for t in range(1, 2 * f + 2)]
  for t in range(1, 2 * f + 2):
    fast, square = b1 * sum(g[:t]), b2 * sum(x**2 for x in g[:t])
    slow = b3 * sum(g[: (t - 1) // f * f])
    _close(got[t - 1]["w"], (fast + alpha * slow) / (np.sqrt(square) + eps))
  np.testing.assert_allclose(
    got[0]["w"], b1 * g[0] / (np.sqrt(b2) * np.abs(g[0]) + eps)
  )


def test_m3_cached_equals_recomputed_and_staggered_groups_refresh():
  kw = dict(slow_every=4, alpha=0.5, second_moment=None)
  cached = _run(optim.scale_by_m3(**kw), 9)[0]
  _close(_run(optim.scale_by_m3(cache_slow=False, **kw), 9)[0], cached)
  got, state = _run(optim.scale_by_m3(stagger=True, **kw), 9)
  # Groups w, stack, b in leaf order b, stack, w: the first is not shifted.
  _close([u["b"] for u in got], [u["b"] for u in cached])
  third = np.mean([_tree(t)["w"] for t in (1, 2)], axis=0)
  _, early = _run(optim.scale_by_m3(stagger=True, **kw), 2)
  _close(early.m2["w"], 0.1 * third, 1e-12)


def test_traced_slow_every():
  make = optax.inject_hyperparams(optim.scale_by_m3, static_args=("ns_steps",))
  _close(
    _run(make(slow_every=3), 7)[0], _run(optim.scale_by_m3(slow_every=3), 7)[0],
    1e-6,
  )  # fmt: skip


# Adam and AdaGrad as memories, identity 22.


def test_22_adam():
  _close(_run(optim.scale_by_adam_memory())[0], _run(optax.scale_by_adam())[0])
  tx = optim.scale_by_adam_memory(
    1.0, 1.0, eps=0.0, accumulate="sum", target="square"
  )
  total = sum(_tree(t)["w"] for t in range(1, 7))
  _close(_run(tx)[0][-1]["w"], total)


@pytest.mark.parametrize("target", ["rms", "square"])
def test_22_is_stationary_for_the_associative_memory(target):
  ridge = 0.3
  tx = optim.scale_by_adam_memory(
    1.0, 1.0, ridge=ridge, accumulate="sum", target=target
  )
  m = _run(tx)[0][-1]["w"]
  g = jnp.stack([_tree(t)["w"] for t in range(1, 7)])
  H = jnp.sum(g**2, axis=0)
  P = jnp.sqrt(H) if target == "rms" else H

  def objective(m):
    return jnp.sum((m[None] * g - P[None]) ** 2) + ridge * jnp.sum(m**2)

  _close(jax.grad(objective)(m), jnp.zeros_like(m), 1e-10)


def test_22_adagrad():
  ours = optim.scale_by_adagrad_memory()
  _close(_run(ours)[0], _run(optax.scale_by_rss())[0])
  total = optim.scale_by_adagrad_memory(momentum=True)
  M = sum(_tree(t)["w"] for t in range(1, 7))
  H = 0.1 + sum(_tree(t)["w"] ** 2 for t in range(1, 7))
  _close(_run(total)[0][-1]["w"], M / jnp.sqrt(H + 1e-7))


@pytest.mark.parametrize("side", ["input", "output"])
def test_22_matrix_adagrad_is_numpys_eigh(side):
  tx = optim.scale_by_adagrad_memory(granularity="matrix", side=side)
  g = [np.asarray(_tree(t)["w"]) for t in range(1, 7)]
  H = 0.1 * np.eye(4 if side == "output" else 6)
  H += sum(x.T @ x if side == "output" else x @ x.T for x in g)
  values, Q = np.linalg.eigh(H + 1e-7 * np.eye(len(H)))
  root = Q * values**-0.5 @ Q.T
  want = g[-1] @ root if side == "output" else root @ g[-1]
  _close(_run(tx)[0][-1]["w"], want, 1e-10)


# Fixture F.

_F = [
  (
    lambda: optim.scale_by_m3(
      0.9, 0.999, 0.9, 0.5, 1e-8, 3, 4, accumulate="sum",
      ns=optim.NewtonSchulz("cubic"),
      second_moment="grad", chunk_reduce="sum", bias_correction=False,
    ),
    0.01,
    "23.79704841 23.68919163 23.64868908 23.54557702 23.51545501 23.43360811",
  ),
  (
    lambda: optim.scale_by_m3(
      0.95, alpha=0.1, slow_every=4, second_moment=None
    ),
    0.05,
    "23.21249557 21.32938770 20.65851905 18.70907565 18.08020307 16.25662847",
  ),
  (
    lambda: optim.scale_by_m3(0.95, alpha=0.1, slow_every=4, b2=0.95),
    0.05,
    "23.27814873 21.65335727 21.02262529 19.10842419 18.46076455 16.61151444",
  ),
  (
    lambda: optim.scale_by_delta_momentum(),
    0.02,
    "21.98713195 13.03976698 10.34702624 4.74929512 3.63420988 1.82191061",
  ),
  (
    lambda: optim.scale_by_delta_momentum(key="raw", eta_decay=0.01),
    0.02,
    "21.98713195 14.27454029 11.75957840 5.36167888 3.74595429 0.78651603",
  ),
  (
    lambda: optim.scale_by_delta_momentum(
      key="raw", decay="prox", eta=0.05, eta_decay=0.05
    ),
    0.4,
    "23.30663942 21.13260057 20.38711671 18.16120737 17.42474365 15.23704253",
  ),
  (
    lambda: optim.scale_by_delta_momentum(
      key="raw", decay="implicit", granularity="element", eta_decay=0.1
    ),
    0.02,
    "21.98713195 13.17764129 10.34168659 3.76998415 2.34228431 0.32359319",
  ),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(_F) + 1))
def test_fixture(row):
  """Losses after steps 1, 4, 5, 8, 9, 12 on |W - T|^2; see the spec."""
  i, j = np.mgrid[0:6, 0:4]
  W, T = jnp.asarray(np.sin(1 + 4 * i + j)), jnp.asarray(np.cos(1 + 4 * i + j))
  make, lr, losses = _F[min(row, len(_F) - 1)]
  tx = optax.chain(make(), optax.scale_by_learning_rate(lr))
  if row == len(_F):  # The alias of the first row.
    losses = _F[0][2]
    tx = optim.m3_paper(
      0.01, alpha=0.5, slow_every=4, ns=optim.NewtonSchulz("cubic"), ns_steps=3
    )
  state = tx.init(W)
  update = jax.jit(tx.update)
  path = []
  for _ in range(12):
    u, state = update(2 * (W - T), state, W)
    W = optax.apply_updates(W, u)
    path.append(float(jnp.sum((W - T) ** 2)))
  got = [path[t - 1] for t in (1, 4, 5, 8, 9, 12)]
  np.testing.assert_allclose(got, [float(x) for x in losses.split()], atol=1e-6)
