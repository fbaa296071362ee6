"""Memories carried from row to row: rows in turn are one long row."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nl_jax import sharding
from nl_jax.data import packing, streams
from nl_jax.models import lm
from nl_jax.train import (
  carry,
  checkpoint,
  files,
  loop,
  optimizer,
  origin,
  start,
  step,
)
from nl_jax.train import options as options_lib
from nl_jax.train import state as state_lib
from tests.laws.models import MODELS

T, ROWS, STREAMS = 16, 3, 2
# Documents of the two streams; each begins at a multiple of the chunk.
LENGTHS = ((24, 8, 16), (8, 40))
LONGER = ((32, 16), (16, 32))  # Of the segments of titans_mac.
NAMES = ("hope", "titans_lmm", "gated_deltanet", "samba", "titans_mac")


def long_rows(lengths=LENGTHS):
  """[STREAMS, ROWS * T] and documents numbered from 2, as streams begin."""
  draw = np.random.default_rng(0)
  shape = STREAMS, ROWS * T
  numbers = [np.repeat(np.arange(len(x)), x) + 2 for x in lengths]
  weights = draw.uniform(0.5, 1, shape).astype(np.float32)
  return {
    "inputs": draw.integers(0, 256, shape).astype(np.int32),
    "targets": draw.integers(0, 256, shape).astype(np.int32),
    "weights": weights,
    "segment_ids": np.stack(numbers).astype(np.int32),
  }


def side_by_side(long):
  """The same as [STREAMS * ROWS, T], numbered row by row as the loader does."""
  rows = {k: x.reshape(-1, T) for k, x in long.items()}
  before = np.roll(rows["segment_ids"][:, -1], 1)
  before[::ROWS] = 1
  rows["segment_ids"] = rows["segment_ids"] - before[:, None] + 1
  return rows


def of_row(rows, j):
  return {k: x[j::ROWS] for k, x in rows.items()}


@functools.cache
def computed(name):
  """(by rows, by one long row, row after row), in float64."""
  with jax.enable_x64(True):
    plain = MODELS[name]()
    model = lm.at_edges(plain)
    params = plain.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    long = long_rows(LENGTHS if model.alignment <= 8 else LONGER)
    rows = side_by_side(long)
    begin = carry.begin(model, params, STREAMS)
    one = jax.jit(
      lambda p, b, c, rows: step.gradient(p, model, b, 1, c, rows),
      static_argnums=3,
    )
    together = one(params, rows, begin, ROWS)
    whole = jax.jit(lambda p, b: step.gradient(p, plain, b, 1))(params, long)
    turns, carried = [], begin
    for j in range(ROWS):
      turns.append(one(params, of_row(rows, j), carried, 1))
      carried = turns[-1][-1]
    return together, whole, turns


def close(a, b, **more):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **more), a, b)


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_turn_are_one_long_row(name):
  together, whole, turns = computed(name)
  # Losses, gradients through all rows and sums of the memories.
  close(together[:3], whole[:3], rtol=1e-7, atol=1e-9)
  losses = [float(t[0]) * float(t[2]) for t in turns]
  np.testing.assert_allclose(
    sum(losses), float(whole[0]) * float(whole[2]), rtol=1e-9
  )
  # The state is the same whether rows came one by one or at once.
  close(together[4], turns[-1][4], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["hope", "gated_deltanet"])
def test_the_gradient_is_cut_between_steps(name):
  together, _, turns = jax.device_get(computed(name))
  scaled = [
    jax.tree.map(lambda g, weight=t[2]: g * weight, t[1]) for t in turns
  ]
  cut = functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), scaled)
  far = jax.tree.map(
    lambda a, b: float(np.max(np.abs(a - b * together[2]))),
    cut, together[1],
  )  # fmt: skip
  assert max(jax.tree.leaves(far)) > 1e-4


def prepared(accumulate=1, devices=1):
  model = MODELS["gated_deltanet"]()
  mesh = sharding.mesh(devices=jax.devices()[:devices])
  made = optimizer.make(model, steps=10, tokens_per_step=64, learning_rate=1e-2)
  like = state_lib.abstract(model, made.tx, mesh, streams=4)
  with jax.set_mesh(mesh):
    state = state_lib.create(model, made.tx, like, seed=0)
    run = step.compiled(
      step.make(
        model, made.tx, made.schedule, made.labels, accumulate=accumulate
      ),
      like, mesh, 4, T,
    )  # fmt: skip
  return run, state, mesh


def three_steps(**how):
  run, state, mesh = prepared(**how)
  long = {k: np.concatenate([x, x[::-1]]) for k, x in long_rows().items()}
  rows, seen = side_by_side(long), []
  with jax.set_mesh(mesh):
    for j in range(ROWS):
      batch = step.on_mesh(of_row(rows, j), mesh, 4)
      state, metrics = run(state, batch)
      seen.append(float(metrics["train/loss"]))
  return seen, jax.device_get(state)


@pytest.mark.parametrize("how", [dict(accumulate=2), dict(devices=4)])
def test_micro_batches_and_meshes_change_nothing(how):
  losses, state = three_steps()
  others, other = three_steps(**how)
  np.testing.assert_allclose(losses, others, rtol=1e-5)
  close(state["carried"], other["carried"], rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(state["carried"]["document_B"], [4, 3, 3, 4])


@pytest.mark.parametrize("keep", ["all", "optimizer"])
def test_other_data_begin_with_streams_that_have_read_nothing(tmp_path, keep):
  model = lm.at_edges(MODELS["gated_deltanet"]())
  mesh = sharding.mesh(devices=jax.devices()[:1])
  like = state_lib.abstract(model, optax.sgd(0.1), mesh, STREAMS)
  number = lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)
  with checkpoint.Checkpoints(tmp_path / "a") as saver:
    meta = {
      "rows_consumed": 6,
      "train_seconds": 1.0,
      "fingerprint": "f",
      "batch_size": 6,
      "sequence_length": T,
    }
    saver.save(1, jax.tree.map(number, like), {"next_row": 6}, meta)
  files.write_json(
    tmp_path / "a" / "config.json", {"config": {}, "fingerprint": "f"}
  )
  saver = checkpoint.Checkpoints(tmp_path / "b")
  about = {"fingerprint": "f", "batch_size": 6, "sequence_length": T}
  found = start.Finder(
    tmp_path / "b", saver, model, like, mesh, about, lambda step: 0.1, 9
  ).find(None, origin.Origin(str(tmp_path / "a"), keep))
  expected = jax.tree.map(number, like)["carried"]
  if keep == "optimizer":
    expected = carry.begin(model, found.state["params"], STREAMS)
  close(found.state["carried"], expected)
  assert found.place == ({"next_row": 6} if keep == "all" else None)


def test_a_step_that_is_skipped_leaves_the_memory_as_it_was():
  run, state, mesh = prepared()
  rows = of_row(
    side_by_side({k: np.concatenate([x, x]) for k, x in long_rows().items()}), 0
  )
  before = jax.device_get(state["carried"])
  rows["weights"] = rows["weights"] * np.float32("nan")
  with jax.set_mesh(mesh):
    state, _ = run(state, step.on_mesh(rows, mesh, 4))
  jax.tree.map(
    np.testing.assert_array_equal, before, jax.device_get(state["carried"])
  )


def test_numbers_of_documents_begin_anew_in_time():
  ids = jnp.asarray([[1, 2, 2, 3]])
  carried = {"memory": 0, "document_B": jnp.asarray([2**30 - 1])}
  seen = []

  def row(params, part, memory):
    seen.append(part["segment_ids"])
    return jnp.zeros(()), (), memory

  _, (_, after) = carry.read_on(row, {}, {"segment_ids": ids}, carried, 1)
  assert seen[0].tolist() == [[2**30 - 1, 2**30, 2**30, 1]]
  # The last document's, not the largest number.
  assert after["document_B"].tolist() == [1]


class Told:
  """Batches that end the process's work when one of them is drawn."""

  def __init__(self, batches, stop_at):
    self.batches, self.left = batches, stop_at

  def __next__(self):
    self.left -= 1
    if not self.left:
      os.kill(os.getpid(), signal.SIGTERM)
    return next(self.batches)

  def get_state(self):
    return self.batches.get_state()

  def set_state(self, state):
    self.batches.set_state(state)


def trained(workdir, stop_at=0):
  """Six steps of two rows of four streams each."""
  model = MODELS["gated_deltanet"]()
  draw = np.random.default_rng(3)
  documents = [
    np.append(draw.integers(3, 259, n), 2) for n in (90, 20, 300, 7, 400)
  ]
  batches = streams.make(
    packing.pack(documents, T, 8), batch_size=8, end_id=2, consecutive=2
  )
  return loop.train(
    model=model,
    optimizer=optimizer.make(
      model, steps=6, tokens_per_step=8 * T, learning_rate=1e-2
    ),
    data=Told(batches, stop_at),
    batch_size=8,
    sequence_length=T,
    workdir=str(workdir),
    config={},
    options=options_lib.Options(
      steps=6, checkpoint_every=4, streams=4, carry_gradient=2
    ),
    mesh=sharding.mesh(devices=jax.devices()[:1]),
  )


def test_a_run_that_was_stopped_remembers_what_it_read(tmp_path):
  whole = trained(tmp_path / "a")
  half = trained(tmp_path / "b", stop_at=4)
  assert half.status == "preempted" and 0 < half.step < 6
  rest = trained(tmp_path / "b")
  jax.tree.map(np.testing.assert_array_equal, whole.state, rest.state)
  assert (rest.state["carried"]["document_B"] > 1).any()


def test_arrays_of_size_0_are_not_carried():
  """Of levels in context: where no layer is without a fast level before it."""
  model = MODELS["hope_incontext"]()
  params = model.init(jax.random.key(0))
  state = model.init_state(params, 2)
  empty = [x for x in jax.tree.leaves(state) if not x.size]
  carried = carry.begin(model, params, 2)["memory"]
  assert empty and all(x.size for x in jax.tree.leaves(carried))
  full = carry.full(model, params, carried)
  assert jax.tree.structure(full) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, full, state)
