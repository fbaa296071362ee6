"""A text that is split over devices is the text of one device.

Loss and gradient of every model in float64, with documents that cross from
one device to the next and padding behind them.
"""

import functools

import jax
import numpy as np
import pytest

from nl_jax import sharding
from nl_jax.models import incontext
from nl_jax.train import step
from tests.laws.models import MODELS

T, ROWS = 128, 2
SPLIT = [
  name
  for name, make in MODELS.items()
  if not isinstance(make(), incontext.InContextModel)
]


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


@functools.cache
def one_device(name):
  """The model, parameters at a generic point, their loss and gradient."""
  model, noise = MODELS[name](), np.random.default_rng(0)
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


def check(name, **sizes):
  with jax.enable_x64(True):
    model, params, alone = one_device(name)
    split = of_mesh(model, params, **sizes)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(split), jax.tree.leaves(alone)
  ):
    error = np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)
    assert error < 1e-10, (sharding.path_name(path), error)


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in SPLIT],
)
def test_eight_devices_are_one(name):
  check(name, sequence=8)
