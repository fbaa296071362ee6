"""Bytes of state as the cost table of docs/optimizers.md says."""

import jax
import jax.numpy as jnp
import pytest

from nl_jax import optim

_SHAPES = {"w": (2, 64, 32), "v": (16, 64)}
_N = 2 * 64 * 32 + 16 * 64


@pytest.mark.parametrize(
  ("tx", "copies"),
  [
    (optim.scale_by_m3(), 5),
    (optim.scale_by_m3(dtypes=optim.StateDtypes(o2=jnp.bfloat16)), 4.5),
    (
      optim.scale_by_m3(
        dtypes=optim.StateDtypes(o2=jnp.bfloat16, slow=jnp.bfloat16)
      ),
      3.5,
    ),
    (optim.scale_by_m3(second_moment=None), 4),
    (optim.scale_by_m3(alpha=None), 2),
    (optim.scale_by_m3(alpha=None, second_moment=None), 1),
    (optim.scale_by_m3(cache_slow=False), 4),
    (optim.scale_by_delta_momentum(), 1),
    (optim.scale_by_delta_momentum(mu_dtype=jnp.bfloat16), 0.5),
    (optim.scale_by_deep_momentum(), 1 + (2 * 64 * 32 + 16 * 8) / _N),
    (
      optim.scale_by_preconditioned_momentum(optim.diag_preconditioner()),
      2,
    ),
    (
      optim.scale_by_preconditioned_momentum(optim.left_gram_preconditioner()),
      1 + (2 * 64 * 64 + 16 * 16) / _N,
    ),
    (optim.scale_by_delta_gradient(), 0),
    (optim.scale_by_adam_memory(), 2),
    (optim.scale_by_adagrad_memory(), 1),
    (optim.scale_by_adagrad_memory(momentum=True), 2),
    (
      optim.multi_frequency(
        optim.scale_by_adam_memory(), {"a": 1, "b": 2}, {"w": "b", "v": "a"}
      ),
      2 + 2 * 64 * 32 / _N,
    ),
  ],
)
def test_copies(tx, copies):
  params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in _SHAPES.items()}
  state = jax.eval_shape(tx.init, params)
  arrays = [x for x in jax.tree.leaves(state) if x.ndim]
  size = sum(x.size * x.dtype.itemsize for x in arrays)
  assert size == 4 * _N * copies
