"""Deep linear attention against a token loop and its limits."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.cli import named
from nl_jax import build
from nl_jax.models import leaves as leaf
from nl_jax.models.mixers.titans import dla
from nl_jax.models.mixers.titans import lmm as titans
from tests.laws.models import MODELS
from tests.models import test_titans

draw, close = test_titans.draw, test_titans.close


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_layer_is_its_token_loop(chunk):
  options = dla.Options(chunk=chunk, hidden=6, residual_clip=0.0, eta_max=0.5)
  model = test_titans.small("dla", options)
  with jax.enable_x64(True):
    params = test_titans.generic(
      leaf.drawn(dla.leaves(model), jax.random.key(0))
    )
    x = draw(1, 10, model.width)
    y = test_titans.mix(dla, model, params, x)
    close(y[0], test_titans.token_loop(model, params, x[0]), 1e-10)


def test_with_a_matrix_it_is_gated_linear_attention():
  """S <- alpha S + eta k^T v, read by q: a sum over pairs with decays."""
  options = dla.Options(
    chunk=4, memory="linear", residual=False, residual_clip=0.0,
    retention_target="zero",
  )  # fmt: skip
  with jax.enable_x64(True):
    q, k, v = (np.asarray(draw(1, 11, 2, 4, seed=i)) for i in range(3))
    eta, alpha = (np.random.default_rng(9).random((2, 1, 11, 2)) + 1) / 3
    gates = titans.memory.Gates(eta, np.log(alpha))
    start = {"w": np.zeros((2, 4, 4))}
    y, _, _ = titans.memory.chunked.update(
      options.forward, start, titans.memory.chunked.start(start, 1, options),
      q, k, v, gates, rule=options,
    )  # fmt: skip
  total = np.cumsum(np.log(alpha), 1)
  decay = np.exp(total[:, :, None] - total[:, None]) * eta[:, None]
  weights = np.einsum("bthk,bshk->btsh", q, k) * decay
  weights *= np.tril(np.ones((11, 11)))[None, :, :, None]
  close(y, np.einsum("btsh,bshv->bthv", weights, v), 1e-12)


@pytest.mark.parametrize("kind", ["random", "constant", "repeated"])
def test_the_default_memory_stays_bounded(kind):
  """docs/mathematics.md 8.1, at 4096 tokens."""
  model = test_titans.small("dla", dla.Options(chunk=8, hidden=8))
  params = leaf.drawn(dla.leaves(model), jax.random.key(0))
  x = draw(1, 4096, 8).astype(np.float32)
  if kind == "constant":
    x = np.broadcast_to(x[:, :1], x.shape)
  if kind == "repeated":
    x = np.repeat(x[:, :256], 16, axis=1)
  _, state, _ = jax.jit(lambda p, x: dla.apply(p, x, None, None, model=model))(
    params, x
  )
  norm = lambda tree: np.sqrt(sum((w**2).sum() for w in jax.tree.leaves(tree)))
  start = jax.tree.map(lambda w: w[None], params["memory"])
  last = jax.tree.map(np.add, start, state.memory.w)
  assert norm(last) < 2 * norm(params["memory"])


@pytest.mark.parametrize("size,total", [
  ("340m", 340.2), ("760m", 760.7), ("1b3", 1300.9),
])  # fmt: skip
def test_sizes_are_the_formula(size, total):
  """5 D² + 12 D + 2 H (D+1) + 2 H K M + K a mixer, in millions."""
  net = build.model(build.resolve(named.load_config(f"dla_{size}")))
  assert abs(net.parameter_count() / 1e6 - total) < 0.06
  D, H, K, M = net.width, net.heads, net.head_dim, net.mixer.hidden
  expected = 5 * D * D + 12 * D + 2 * H * (D + 1) + 2 * H * K * M + K
  assert leaf.count(dla.leaves(net)) == expected


def test_the_card_says_what_it_is():
  rows, _ = MODELS["dla"]().levels()
  assert rows[0].name == "DLA memory"
  assert (rows[0].objective, rows[0].rule) == ("dot", "GD, retention")


@pytest.mark.parametrize("change", [
  dict(objective="l2"), dict(momentum="ema"),
])  # fmt: skip
def test_what_would_be_titans_is_refused(change):
  with pytest.raises(ValueError, match="use model.arch='titans_lmm'"):
    dataclasses.replace(MODELS["dla"]().mixer, **change)
