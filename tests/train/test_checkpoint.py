"""Checkpoints: damage, mismatch, parameters alone."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax import sharding
from nl_jax.train import checkpoint, optimizer, stored
from nl_jax.train import state as state_lib
from tests.train import stub

pytestmark = pytest.mark.versions

MODEL = stub.Model()
OPTIMIZER = optimizer.make(
  MODEL, steps=10, tokens_per_step=stub.TOKENS, learning_rate=1e-2
)


@pytest.fixture(scope="module")
def like() -> state_lib.State:
  mesh = sharding.mesh(devices=jax.devices()[:1])
  return state_lib.abstract(MODEL, OPTIMIZER.tx, mesh)


@pytest.fixture(scope="module")
def saved(like, tmp_path_factory) -> pathlib.Path:
  """A workdir with steps 1, 2, 3 of a state of embeddings 1, 2, 3."""
  folder = tmp_path_factory.mktemp("saved")
  with checkpoint.Checkpoints(folder) as saver:
    for step in (1, 2, 3):
      state = state_of(like, step)
      saver.save(step, state, {"next_row": step}, {"train_seconds": 1.5})
  return folder


def state_of(like: state_lib.State, step: int) -> state_lib.State:
  fill = lambda x: jax.device_put(jnp.full(x.shape, step, x.dtype), x.sharding)
  return jax.tree.map(fill, like)


def copy(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def truncate(folder: pathlib.Path) -> None:
  for path in folder.rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_arrays(folder: pathlib.Path) -> None:
  for path in folder.glob("state/**/d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_state(folder: pathlib.Path) -> None:
  shutil.rmtree(folder / "state")


def remove_data(folder: pathlib.Path) -> None:
  shutil.rmtree(folder / "data")


def empty(folder: pathlib.Path) -> None:
  shutil.rmtree(folder)
  folder.mkdir()


DAMAGES = [truncate, truncate_arrays, remove_state, remove_data, empty]


def test_newest_comes_back(saved, like):
  with checkpoint.Checkpoints(saved) as saver:
    restored = saver.restore(like)
  assert (restored.step, restored.data) == (3, {"next_row": 3})
  assert restored.meta["train_seconds"] == 1.5
  expected = state_of(like, 3)
  jax.tree.map(np.testing.assert_array_equal, restored.state, expected)
  same = lambda a, b: a.dtype == b.dtype and a.sharding == b.sharding
  assert all(jax.tree.leaves(jax.tree.map(same, restored.state, expected)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_last_step_falls_back(saved, like, tmp_path, damage, caplog):
  folder = copy(saved, tmp_path)
  damage(folder / "checkpoints" / "3")
  with checkpoint.Checkpoints(folder) as saver:
    assert saver.restore(like).step == 2
    assert "step 3 cannot be read" in caplog.text
    # The step can be taken again, and what was there is not lost.
    saver.save(3, state_of(like, 3), {"next_row": 3}, {})
  assert (folder / "damaged" / "3").is_dir()
  with checkpoint.Checkpoints(folder) as saver:
    assert saver.restore(like).step == 3


def test_strangers_among_the_checkpoints_are_passed_by(saved, like, tmp_path):
  """A file, a copy by another name, and a step that was copied."""
  folder = copy(saved, tmp_path)
  steps = folder / "checkpoints"
  for name in ("9", "notes.txt", "3.bak", "\N{SUPERSCRIPT TWO}"):
    (steps / name).write_text("precious")
  for name in ("3 (copy)", "4.old", "\N{ARABIC-INDIC DIGIT SEVEN}", "007"):
    shutil.copytree(steps / "3", steps / name)
  strangers = {path.name for path in steps.iterdir()} - {*"123"}
  shutil.copytree(steps / "3", steps / "7")
  assert checkpoint.latest_step(str(folder)) == 7
  params, step = checkpoint.load_params(str(folder), MODEL)
  assert step == 3
  np.testing.assert_array_equal(params["embed"], 3)
  with pytest.raises(ValueError, match="no checkpoint of step 9 .*1, 2, 3, 7"):
    checkpoint.load_params(str(folder), MODEL, step=9)
  assert checkpoint.read_other(str(folder), like).step == 3
  with checkpoint.Checkpoints(folder) as saver:
    assert saver.restore(like).step == 3
    saver.save(4, state_of(like, 4), {"next_row": 4}, {})
  assert (folder / "damaged" / "7").is_dir()
  assert strangers <= {path.name for path in steps.iterdir()}
  with checkpoint.Checkpoints(folder) as saver:
    assert saver.restore(like).step == 4


def test_all_damaged_is_one_sentence_and_changes_nothing(saved, like, tmp_path):
  folder = copy(saved, tmp_path)
  for step in "123":
    truncate(folder / "checkpoints" / step)
  with checkpoint.Checkpoints(folder) as saver:
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
      saver.restore(like)
  assert not (folder / "damaged").exists()
  names = {p.name for p in (folder / "checkpoints").iterdir()}
  assert {"1", "2", "3"} <= names


def test_interrupted_save_is_no_checkpoint(saved, like, tmp_path):
  folder = copy(saved, tmp_path)
  steps = folder / "checkpoints"
  (steps / "3").rename(steps / "3.orbax-checkpoint-tmp")
  with checkpoint.Checkpoints(folder) as saver:
    assert saver.restore(like).step == 2
    saver.save(3, state_of(like, 3), {"next_row": 3}, {})
  assert checkpoint.latest_step(str(folder)) == 3


def test_no_checkpoint_is_none(tmp_path, like):
  with checkpoint.Checkpoints(tmp_path) as saver:
    assert saver.restore(like) is None
  assert checkpoint.latest_step(str(tmp_path)) is None


def test_a_step_is_taken_once(saved, like, tmp_path):
  folder = copy(saved, tmp_path)
  with checkpoint.Checkpoints(folder) as saver:
    with pytest.raises(checkpoint.StepMismatchError, match="latest is 3"):
      saver.save(2, state_of(like, 2), {}, {})


def test_state_of_another_step_is_not_taken(like, tmp_path):
  with checkpoint.Checkpoints(tmp_path) as saver:
    saver.save(7, state_of(like, 5), {}, {})
  with checkpoint.Checkpoints(tmp_path) as saver:
    with pytest.raises(ValueError, match="holds a state of step 5"):
      saver.restore(like)


@pytest.mark.parametrize(
  ("change", "text"),
  [
    (lambda x: jax.ShapeDtypeStruct((4, 4), x.dtype), r"expected float32\[4"),
    (lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), "expected bfloat"),
    (lambda x: {"new": x}, "embed/new is missing"),
  ],
)
def test_another_model_is_refused_and_nothing_moved(saved, like, change, text):
  params = {**like["params"], "embed": change(like["params"]["embed"])}
  with checkpoint.Checkpoints(saved) as saver:
    with pytest.raises(checkpoint.LeavesMismatchError, match=text):
      saver.restore({**like, "params": params})
  assert not (saved / "damaged").exists()


def test_keep_leaves_the_newest(like, tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=2) as saver:
    for step in range(5):
      saver.save(step, state_of(like, step), {}, {})
  steps = [p.name for p in (tmp_path / "checkpoints").iterdir()]
  assert sorted(s for s in steps if s.isdigit()) == ["3", "4"]


def test_saved_state_may_be_donated_at_once(tmp_path):
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = {"x": jnp.zeros((1500, 1500)), "step": jnp.zeros((), jnp.int32)}
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )
  with checkpoint.Checkpoints(tmp_path, keep=9) as saver:
    for i in range(1, 5):
      state = step(state)
      saver.save(i, state, {}, {})
      for _ in range(3):
        state = step(state)
      state = {**state, "step": jnp.asarray(i, jnp.int32)}
    saver.wait()
    for i in range(1, 5):
      restored = stored.read(tmp_path / "checkpoints", i, like)
      np.testing.assert_array_equal(restored.state["x"], 4 * i - 3)


def test_parameters_alone(saved, like):
  params, step = checkpoint.load_params(str(saved), MODEL)
  assert step == 3
  expected = state_of(like, 3)["params"]
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  params, step = checkpoint.load_params(str(saved), MODEL, step=1)
  assert step == 1 and float(params["embed"][0, 0]) == 1
  mesh = sharding.mesh(fsdp=4, tensor=2)
  params, _ = checkpoint.load_params(str(saved), MODEL, mesh=mesh)
  assert params["embed"].sharding.spec == sharding.spec("vocab", "embed")


def test_parameters_pass_over_damage_and_change_nothing(saved, tmp_path):
  folder = copy(saved, tmp_path)
  truncate_arrays(folder / "checkpoints" / "3")
  assert checkpoint.load_params(str(folder), MODEL)[1] == 2
  assert (folder / "checkpoints" / "3").exists()
  with pytest.raises(ValueError, match="can be read"):
    checkpoint.load_params(str(folder), MODEL, step=3)


def test_parameters_of_nothing_or_another_model(saved, tmp_path):
  with pytest.raises(ValueError, match="train first"):
    checkpoint.load_params(str(tmp_path), MODEL)
  with pytest.raises(ValueError, match=r"there are \[1, 2, 3\]"):
    checkpoint.load_params(str(saved), MODEL, step=9)
  with pytest.raises(checkpoint.LeavesMismatchError, match="cms/ffn"):
    checkpoint.load_params(str(saved), stub.Model((32, 64)))


def test_config_of_no_run(tmp_path):
  with pytest.raises(ValueError, match="no run in"):
    checkpoint.read_config(str(tmp_path))
