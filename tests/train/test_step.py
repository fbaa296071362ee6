"""The step: the loss, micro-batches, the guard."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nl_jax import sharding
from nl_jax.train import optimizer, step
from nl_jax.train import state as state_lib
from tests.train import stub

MODEL = stub.Model()


def uneven() -> dict[str, np.ndarray]:
  """A batch whose rows have very different weights."""
  batch = stub.batch()
  batch["weights"] = (
    np.linspace(0, 3, batch["weights"].size)
    .reshape(batch["weights"].shape)
    .astype(np.float32)
  )
  batch["weights"][3:] *= batch["segment_ids"][3:] > 0
  batch["weights"][:2] = 0
  return batch


def test_loss_is_the_weighted_mean_over_real_targets():
  params = MODEL.init(jax.random.key(0))
  batch = uneven()
  loss, _, weight, *_ = jax.jit(lambda p, b: step.gradient(p, MODEL, b, 1))(
    params, batch
  )
  logits, _, _ = MODEL.apply(
    params, batch["inputs"], segment_ids=batch["segment_ids"]
  )
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  nll = -np.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0]
  expected = (nll * batch["weights"]).sum() / batch["weights"].sum()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(weight, batch["weights"].sum(), rtol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_give_the_gradient_of_the_batch(accumulate):
  with jax.enable_x64(True):
    params = MODEL.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    batch = uneven()
    whole = jax.jit(lambda p, b: step.gradient(p, MODEL, b, 1))(params, batch)
    parts = jax.jit(lambda p, b: step.gradient(p, MODEL, b, accumulate))(
      params, batch
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12),
      (whole[1], whole[2]),
      (parts[1], parts[2]),
    )
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-6)
    means = [step.memory_means(x[3]) for x in (whole, parts)]
    for name in means[0]:
      np.testing.assert_allclose(means[0][name], means[1][name], rtol=1e-6)


def test_batch_of_padding_has_gradient_zero():
  params = MODEL.init(jax.random.key(0))
  batch = {k: np.zeros_like(x) for k, x in stub.batch().items()}
  loss, grads, weight, sums, _ = step.gradient(params, MODEL, batch, 2)
  assert float(loss) == float(weight) == 0
  assert float(optax.tree.norm(grads)) == 0
  assert all(np.isfinite(x) for x in jax.tree.leaves(step.memory_means(sums)))


def prepared(max_skipped: int):
  made = optimizer.make(
    MODEL, steps=10, tokens_per_step=stub.TOKENS, learning_rate=1e-2
  )
  mesh = sharding.mesh(devices=jax.devices()[:1])
  like = state_lib.abstract(MODEL, made.tx, mesh)
  state = state_lib.create(MODEL, made.tx, like, seed=0)
  run = step.make(
    MODEL, made.tx, made.schedule, made.labels, max_skipped=max_skipped
  )
  return jax.jit(run), state


def test_a_step_that_is_not_finite_moves_nothing():
  run, state = prepared(max_skipped=1)
  bad = stub.batch()
  bad["segment_ids"][1, 1] = 7
  new, metrics = run(state, bad)
  assert not np.isfinite(metrics["train/loss"])
  for key in ("params", "opt"):
    jax.tree.map(np.testing.assert_array_equal, new[key], state[key])
  assert (int(new["step"]), int(new["skipped"])) == (1, 1)
  good, _ = run(new, stub.batch())
  assert float(
    jnp.max(jnp.abs(good["params"]["embed"] - new["params"]["embed"]))
  )


def test_nothing_moves_beyond_the_limit():
  run, state = prepared(max_skipped=0)
  bad = stub.batch()
  bad["segment_ids"][1, 1] = 7
  state, _ = run(state, bad)
  after, metrics = run(state, stub.batch())
  assert np.isfinite(metrics["train/loss"])
  jax.tree.map(np.testing.assert_array_equal, after["params"], state["params"])
  assert (int(after["step"]), int(after["skipped"])) == (2, 1)


def test_norms_of_levels():
  model = stub.Model((stub.TOKENS, 2 * stub.TOKENS))
  made = optimizer.make(
    model, steps=10, tokens_per_step=stub.TOKENS, learning_rate=1e-2
  )
  mesh = sharding.mesh(devices=jax.devices()[:1])
  like = state_lib.abstract(model, made.tx, mesh)
  state = state_lib.create(model, made.tx, like, seed=0)
  run = jax.jit(step.make(model, made.tx, made.schedule, made.labels))
  _, metrics = run(state, stub.batch())
  parts = [
    float(metrics[f"opt/{name}/update_norm"])
    for name in ("slow", "cms/high", "cms/mid")
  ]
  assert parts[2] == 0 and parts[0] > 0 and parts[1] > 0
  total = float(metrics["opt/update_norm"])
  assert total == pytest.approx(np.linalg.norm(parts), rel=1e-5)
