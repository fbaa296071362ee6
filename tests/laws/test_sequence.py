"""A text that is split over devices is the text of one device.

Loss and gradient of every model in float64, with documents that cross from
one device to the next and padding after them.
"""

import dataclasses

import jax
import numpy as np
import pytest

from nl_jax import sharding
from nl_jax.train import step
from tests.laws.models import MODELS

T, ROWS = 128, 2
# One model for each way over devices; those left out are variants of these.
SIZES = {
  "transformer": dict(sequence=4, fsdp=2),
  "hope_attention_window": dict(sequence=8),
  "hope_linear": dict(sequence=2),
  "hope": dict(sequence=8),
  "hope_momentum": dict(sequence=4, fsdp=2),  # Two walks.
  "gated_deltanet": dict(sequence=4, fsdp=2),
  "titans_linear": dict(sequence=4, fsdp=2),  # Momentum, a learned start.
  "retnet": dict(sequence=8),
  "rwkv7": dict(sequence=8),
  "samba": dict(sequence=8),
  "titans_span": dict(sequence=4, fsdp=2),
  "titans_omega": dict(sequence=4),
  "memora_lag": dict(sequence=8),
  "titans_mag": dict(sequence=8),
  "titans_mac": dict(sequence=4),
  "ttt_linear": dict(sequence=8),
}


def _made(name):
  """The model of that name; a matrix that learns by momentum is none there."""
  if name != "titans_linear":
    return MODELS[name]()
  options = dict(memory="linear", hidden=0, residual_clip=0.0)
  model = MODELS["titans_lmm"]()
  return dataclasses.replace(
    model, mixer=dataclasses.replace(model.mixer, **options)
  )


def batch(alignment):
  """Two documents in a row, then padding; the second row has one."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, 259, (ROWS, T + 1))
  ids = np.ones((ROWS, T), np.int32)
  ids[0, max(40 // alignment * alignment, alignment) :] = 2
  ids[0, 101:] = 0
  return dict(
    inputs=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=ids,
    weights=np.where(ids > 0, 1.0, 0.0),
  )  # fmt: skip


def one_device(name):
  """The model, parameters at a generic point, their loss and gradient."""
  model, noise = _made(name), np.random.default_rng(0)
  model = dataclasses.replace(model, remat="none")  # Compiled once less.
  params = jax.tree.map(
    lambda x: np.asarray(x, float) + 0.02 * noise.standard_normal(x.shape),
    jax.jit(model.init)(jax.random.key(0)),
  )
  return model, params, of_mesh(model, params, 1)


def of_mesh(model, params, sequence, fsdp=1):
  """Loss and gradient over so many devices."""
  devices = jax.devices()[: sequence * fsdp]
  mesh = sharding.mesh(fsdp=fsdp, sequence=sequence, devices=devices)
  rows = batch(model.alignment)
  by_batch = sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    run = jax.jit(
      jax.value_and_grad(lambda p, rows: step.loss_sum(p, model, rows)[0]),
      in_shardings=(sharding.param_shardings(params, mesh), by_batch),
    )
    return jax.tree.map(np.asarray, run(params, rows))


@pytest.mark.parametrize("name", SIZES)
def test_many_devices_are_one(name):
  with jax.enable_x64(True):
    model, params, alone = one_device(name)
    split = of_mesh(model, params, **SIZES[name])
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(split), jax.tree.leaves(alone)
  ):
    error = np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)
    assert error < 1e-10, (sharding.path_name(path), error)
