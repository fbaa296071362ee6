"""Any file of a checkpoint cut, gone or with a bit turned: no wrong values."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nl_jax import files, sharding
from nl_jax.train import checkpoint, seal


def state_of(step: int) -> dict:
  """Larger than what orbax keeps inside its own files."""
  keys = jax.random.split(jax.random.key(step))
  return {
    "x": jax.random.normal(keys[0], (128, 96)),
    "y": jax.random.normal(keys[1], (64, 33)).astype(jnp.bfloat16),
    "step": jnp.asarray(step, jnp.int32),
  }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("saved")
  with checkpoint.Checkpoints(folder) as saver:
    for step in (1, 2):
      saver.save(step, state_of(step), {"next_row": step}, {"a": 0.1})
  return folder


def largest(step: pathlib.Path) -> pathlib.Path:
  paths = [path for path in step.rglob("*") if path.is_file()]
  return max(paths, key=lambda path: path.stat().st_size)


def cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn(path: pathlib.Path) -> None:
  """Turns a bit in the middle."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


def restore(folder: pathlib.Path) -> checkpoint.Restored:
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state_of(0),
  )
  with checkpoint.Checkpoints(folder) as saver:
    restored = saver.restore(like)
    saver.open()
  return restored


@pytest.mark.parametrize("hurt", [cut, turn, pathlib.Path.unlink])
def test_a_large_array_that_is_hurt_falls_back(saved, tmp_path, hurt):
  folder = pathlib.Path(shutil.copytree(saved, tmp_path / "run"))
  hurt(largest(folder / "checkpoints" / "2"))
  restored = restore(folder)
  assert restored.step == 1
  jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(1))
  assert (folder / "damaged" / "2").is_dir()


@pytest.mark.parametrize("item", ["data", "meta"])
def test_a_turned_bit_beside_the_arrays_falls_back(saved, tmp_path, item):
  folder = pathlib.Path(shutil.copytree(saved, tmp_path / "run"))
  path = folder / "checkpoints" / "2" / item / "metadata"
  old, new = ("2}", "3}") if item == "data" else ('"a": 0.1', '"a": 0.3')
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))
  restored = restore(folder)
  assert (restored.step, restored.data) == (1, {"next_row": 1})


def test_a_checkpoint_of_before_there_were_seals_is_read(saved, tmp_path):
  folder = pathlib.Path(shutil.copytree(saved, tmp_path / "run"))
  path = folder / "checkpoints" / "2" / "meta" / "metadata"
  meta = json.loads(path.read_text())
  path.write_text(json.dumps({k: meta[k] for k in ("a", "leaves")}))
  assert restore(folder).step == 2


def test_sums_are_of_the_bits_and_the_same_on_every_mesh():
  x = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
  expected = {"x": int(x.view(np.uint32).sum(dtype=np.uint64) % 2**32)}
  assert seal.sums({"x": jnp.asarray(x)}) == expected
  for sizes in ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}):
    spec = jax.sharding.PartitionSpec(("fsdp", "tensor"))
    put = jax.sharding.NamedSharding(sharding.mesh(**sizes), spec)
    assert seal.sums({"x": jax.device_put(x, put)}) == expected


@pytest.mark.parametrize("dtype", ["bool", "int8", "bfloat16", "float32"])
def test_every_bit_counts(dtype):
  x = jnp.zeros((5, 3), dtype)
  saved = {"sums": {**seal.sums({"x": x}), "other": 1}}
  seal.check_sums({"x": x}, saved)
  with pytest.raises(files.BrokenSealError, match="x is not what was saved"):
    seal.check_sums({"x": x.at[2, 1].set(jnp.ones((), dtype))}, saved)
