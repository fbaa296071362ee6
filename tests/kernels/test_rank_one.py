"""The chunk form equals the token loop (docs/architecture.md 5)."""

import itertools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from nl_jax.kernels import rank_one
from nl_jax.kernels.walk import products

B, H, C, A, E = 2, 2, 7, 4, 3

READS = ("after", "before", "chunk_start")
RULES = {
  "gd": dict(momentum=False, erase=False),
  "dgd": dict(momentum=False, erase=True),
  "gd_momentum": dict(momentum=True, erase=False),
  "dgd_momentum": dict(momentum=True, erase=True),
  # One rate for both: the system of fewer terms.
  "write": dict(momentum=False, erase="write"),
  "decayed": dict(momentum=False, erase="decayed"),
  "decayed_momentum": dict(momentum=True, erase="decayed"),
}
RETENTION = {
  "zero": (False, "whole"),
  "init_deviation": (True, "deviation"),
  "init_whole": (True, "whole"),
}


def make(seed, *, momentum, erase, target, masked=False, C=C):
  rng = np.random.default_rng(seed)
  f = lambda *shape: jnp.asarray(rng.standard_normal(shape))
  sigmoid = lambda *shape: jax.nn.sigmoid(f(*shape))
  mask = jnp.ones((B, 1, C, 1), bool)
  if masked:
    mask = jnp.asarray(rng.random((B, 1, C, 1)) < 0.6)
  gates = rank_one.Rates(
    jnp.log(sigmoid(B, H, C, 1)),
    jnp.log(sigmoid(B, H, C, 1)) if momentum else None,
    sigmoid(B, H, C, 1),
    sigmoid(B, H, C, 1) if erase is True else erase or None,
    mask,
  )
  args = dict(
    U=f(B, H, C, A),
    Delta=f(B, H, C, E),
    Q=f(B, H, C, A),
    W=f(B, H, A, E),
    S=f(B, H, A, E) if momentum else None,
    R=f(1, H, A, E) if target else None,
  )
  extra = dict(anchor=f(B, H, A, E), start=f(1, H, A, E))
  return args, gates, extra


def run(args, gates, extra, **options):
  return rank_one.rank_one(
    args["U"], args["Delta"], args["Q"], gates, args["W"], args["S"], args["R"],
    **extra, **options,
  )  # fmt: skip


def close(x, y, tolerance=1e-10):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * max(1.0, float(np.abs(b).max()))
    ),
    x,
    y,
  )


def both(args, gates, extra, **options):
  """Values and all gradients of the two forms."""

  logs = [None if isinstance(g, str) else g for g in gates[:-1]]

  def loss(args, logs, extra, implementation):
    gates_now = rank_one.Rates(*logs, gates.mask)
    if isinstance(gates.erase, str):
      gates_now = gates_now._replace(erase=gates.erase)
    out = run(args, gates_now, extra, implementation=implementation, **options)
    weights = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)), out)
    terms = jax.tree.map(lambda x, w: (x.ravel() * w).sum(), out, weights)
    return sum(jax.tree.leaves(terms)), out

  results = []
  for implementation in ("reference", "xla"):
    fun = jax.jit(
      jax.value_and_grad(
        lambda *a, i=implementation: loss(*a, i), (0, 1, 2), has_aux=True
      )
    )
    (_, out), grads = fun(args, logs, extra)
    results.append((out, grads))
  return results


# Every read with retention to the start; the other targets with one read.
CASES = [
  *itertools.product(RULES, ("init_deviation",), READS),
  *itertools.product(RULES, ("zero", "init_whole"), ("after",)),
]


@pytest.mark.versions
@pytest.mark.parametrize("rule,retention,read", CASES)
def test_chunk_form_equals_token_loop(rule, retention, read):
  target, erase_of = RETENTION[retention]
  with jax.enable_x64(True):
    args, gates, extra = make(0, target=target, masked=True, **RULES[rule])
    reference, chunk = both(args, gates, extra, read=read, erase_of=erase_of)
  close(chunk, reference)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("read", READS)
def test_documents_inside_a_chunk(rule, read):
  ids = jnp.asarray([[3, 3, 0, 5, 5, 0, 6], [0, 2, 2, 2, 2, 4, 0]])[:, None]
  with jax.enable_x64(True):
    args, gates, extra = make(1, target=True, **RULES[rule])
    gates = gates._replace(mask=(ids != 0)[..., None])
    reference, chunk = both(
      args, gates, extra,
      read=read, erase_of="deviation", segment_ids=ids,
    )  # fmt: skip
  close(chunk, reference)


def past(weights, seed=9):
  """Tokens before the chunk, with the weights of all in each write."""
  rng = np.random.default_rng(seed)
  before = weights.shape[-1] - C
  f = lambda size: jnp.asarray(rng.standard_normal((B, H, before, size)))
  return f(A), f(E), jnp.asarray(weights)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("read", READS)
def test_a_token_writes_for_others_too(rule, read):
  """Any weights of now and before; masks, documents and gradients."""
  ids = np.asarray([[3, 3, 0, 5, 5, 0, 6], [0, 2, 2, 2, 2, 4, 0]])
  index = np.asarray([[0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1, 1]])
  index = np.concatenate([np.zeros((B, 3), int), index], 1)
  allowed = np.tril(np.ones((C, C + 3)), 3) * (
    index[:, 3:, None] == index[:, None]
  )
  weights = np.random.default_rng(9).random((B, H, C, C + 3))
  with jax.enable_x64(True):
    args, gates, extra = make(11, target=True, **RULES[rule])
    ids = jnp.asarray(ids)[:, None]
    gates = gates._replace(mask=(ids != 0)[..., None])
    extra["window"] = past(weights * allowed[:, None])
    reference, chunk = both(
      args, gates, extra,
      read=read, erase_of="deviation", segment_ids=ids,
    )  # fmt: skip
    close(chunk, reference)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_window_of_one_token_is_none(implementation):
  options = dict(read="after", erase_of="whole", implementation=implementation)
  with jax.enable_x64(True):
    args, gates, extra = make(12, target=True, **RULES["dgd_momentum"])
    plain = run(args, gates, extra, **options)
    one = extra | {"window": past(np.broadcast_to(np.eye(C), (B, H, C, C)))}
    close(run(args, gates, one, **options), plain, 1e-13)


def test_new_document_forgets_the_old_one():
  ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 2]] * B)[:, None]
  with jax.enable_x64(True):
    args, gates, extra = make(2, target=True, **RULES["dgd_momentum"])
    options = dict(read="after", erase_of="deviation", segment_ids=ids)
    moved = dict(args, U=args["U"].at[:, :, :3].add(1.0))
    y, W, S = run(args, gates, extra, **options)
    y2, W2, S2 = run(moved, gates, extra, **options)
  assert (y[:, :, 3:] == y2[:, :, 3:]).all()
  assert (W == W2).all() and (S == S2).all()
  assert not (y[:, :, :3] == y2[:, :, :3]).all()


def test_two_calls_equal_one():
  with jax.enable_x64(True):
    args, gates, extra = make(3, target=True, **RULES["dgd_momentum"])
    options = dict(read="after", erase_of="deviation")
    whole = run(args, gates, extra, **options)
    tokens = {name: args[name] for name in ("U", "Delta", "Q")}
    first = dict(args, **{k: v[:, :, :3] for k, v in tokens.items()})
    y1, W, S = run(
      first, jax.tree.map(lambda g: g[..., :3, :], gates), extra, **options
    )
    rest = dict(args, **{k: v[:, :, 3:] for k, v in tokens.items()}, W=W, S=S)
    y2, W, S = run(
      rest, jax.tree.map(lambda g: g[..., 3:, :], gates), extra, **options
    )
  close((jnp.concatenate([y1, y2], 2), W, S), whole)


def test_masked_token_is_an_exact_no_op():
  args, gates, extra = make(4, target=True, **RULES["dgd_momentum"])
  none = gates._replace(mask=jnp.zeros((B, 1, C, 1), bool))
  for implementation in ("reference", "xla"):
    _, W, S = run(
      args, none, extra,
      read="after", erase_of="deviation", implementation=implementation,
    )  # fmt: skip
    close((W, S), (args["W"], args["S"]), 1e-6)


@pytest.mark.parametrize("value", [0.0, -20.0, -80.0])
def test_extreme_decay_has_finite_gradients(value):
  args, gates, extra = make(5, target=True, **RULES["dgd_momentum"])
  gates = gates._replace(log_alpha=jnp.full_like(gates[0], value))
  reference, chunk = both(
    args, gates, extra, read="after", erase_of="deviation"
  )
  for x in jax.tree.leaves(chunk):
    assert np.isfinite(x).all()
  close(chunk, reference, 1e-4)


@pytest.mark.parametrize("rate,shared", [(1.0, False), (0.5, True)])
def test_identical_keys(rate, shared):
  """The erase system at its worst: every key of the chunk is the same."""
  args, gates, extra = make(6, target=False, C=64, **RULES["dgd"])
  u = jax.nn.one_hot(jnp.zeros((B, H, 64), int), A)
  args = dict(args, U=u, Q=u)
  full = jnp.full_like(gates.write, rate)
  gates = gates._replace(
    log_alpha=0 * full, write=full, erase="write" if shared else full
  )
  reference, chunk = both(args, gates, extra, read="after", erase_of="whole")
  close(chunk, reference, 1e-5)


def invert(L):
  block = 1 << (L.shape[-1] - 1).bit_length()
  rows = jnp.eye(L.shape[-1], dtype=L.dtype)[None]
  return products.EXACT.solve([(L, rows)], block)[0]


@pytest.mark.parametrize("size", [1, 2, 3, 16, 48, 128])
def test_inverse_of_correlated_keys(size):
  rng = np.random.default_rng(0)
  for L in (np.ones((size, size)), 0.9 + 0.1 * rng.random((size, size))):
    L = np.tril(L, -1)
    with jax.enable_x64(True):
      X = np.asarray(invert(jnp.asarray(L)[None])[0])
    np.testing.assert_allclose(X @ (np.eye(size) + L), np.eye(size), atol=1e-9)


def test_inverse_derivative_matches_finite_differences():
  with jax.enable_x64(True):
    L = jnp.tril(jax.random.normal(jax.random.key(0), (5, 5)), -1)
    f = lambda L: jnp.sin(invert(jnp.tril(L, -1)[None])).sum()
    jax.test_util.check_grads(f, (L,), order=2, modes=("rev",))


def test_errors_name_the_switch():
  args, gates, extra = make(7, target=True, **RULES["dgd"])
  with pytest.raises(ValueError, match="read must be one of"):
    run(args, gates, extra, read="later", erase_of="whole")
  with pytest.raises(ValueError, match="only one of them"):
    run(dict(args, S=args["W"]), gates, extra, read="after", erase_of="whole")
  channel = gates._replace(log_alpha=gates.log_alpha[..., None])
  with pytest.raises(ValueError, match="reference"):
    run(args, channel, extra, read="after", erase_of="whole")
