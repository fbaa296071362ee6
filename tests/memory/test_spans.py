"""Local memories that are reset, beside a global one."""

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax import memory
from nl_jax.memory import mlp, spans

B, T, H, K, C, S = 2, 48, 2, 4, 4, 16
RULE = memory.Rule(chunk=C, momentum="ema", dgd_scope="none")


def drawn():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  keys = jax.random.split(jax.random.key(0), 2)
  params = {
    name: jax.tree.map(lambda x: 4 * x.astype(float), mlp.init(key, H, K, 8))
    for name, key in zip(("local", "wide"), keys)
  }
  q, k, v = (draw(B, T, H, K) for _ in range(3))
  gates = memory.Gates(
    0.2 * jax.nn.sigmoid(draw(B, T, H)),
    jax.nn.log_sigmoid(2 + draw(B, T, H)),
    jax.nn.log_sigmoid(draw(B, T, H)),
  )
  return params, unit(q), unit(k), v, gates


def run(params, q, k, v, gates, ids, apart):
  """Reads and states; `apart`: spans as rows of the batch."""
  state = spans.start(params, B, K, RULE, S)
  y, state, _ = spans.update(
    mlp.forward("mlp", False), params, state, q, k, v, gates,
    rule=RULE, span=S, segment_ids=ids, at_edge=apart, aligned=apart,
  )  # fmt: skip
  return y, state


def test_spans_as_rows_are_spans_one_after_the_other():
  """Documents and padding, the state after them, and gradients."""
  ids = np.ones((B, T), np.int32)
  ids[0, 16:], ids[0, 39:], ids[1, 30:] = 2, 0, 0
  with jax.enable_x64(True):
    args = drawn()

    def both(apart):
      def loss(*args):
        y, state = run(*args, ids, apart)
        y = jnp.where((ids > 0)[..., None, None], y, 0)
        local = jax.tree.leaves((state.local.w, state.keys.w))
        return jnp.sin(y).sum() + sum(jnp.sin(x).sum() for x in local), y

      made = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True))
      return made(*args)

    for x, y in zip(*(jax.tree.leaves(both(a)) for a in (True, False))):
      np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10)


def test_a_local_memory_knows_its_span_alone():
  with jax.enable_x64(True):
    params, q, k, v, gates = drawn()
    none = jax.tree.map(jnp.zeros_like, params["wide"])
    read = jax.jit(
      lambda v: run(params | {"wide": none}, q, k, v, gates, None, True)[0]
    )
    there = jax.jacobian(lambda v0: read(v.at[0, 5].set(v0)))(v[0, 5])
  moved = np.abs(there).max(axis=(-1, -2, -3))[0].max(axis=-1)
  # The gradient point is a chunk's start; V = 0 of two layers never moves.
  assert (moved[5:S] > 0).all() and not moved[S:].any()
  assert not moved[:5].any()
