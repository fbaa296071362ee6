"""Where one array cannot be read, nothing of the others is left behind."""

import asyncio
import gc
import time

import jax
import orbax.checkpoint as ocp
import pytest

from nl_jax.train import checkpoint, reading


def test_the_others_are_read_to_the_end(monkeypatch):
  ended = []

  async def read(slow: bool) -> None:
    if not slow:
      raise ValueError("torn")
    await asyncio.sleep(0.1)
    ended.append(slow)

  async def deserialize(self, infos, args=None):
    return await asyncio.gather(read(True), read(False), read(True))

  monkeypatch.setattr(
    ocp.type_handlers.ArrayHandler, "deserialize", deserialize
  )
  loop = asyncio.new_event_loop()
  with pytest.raises(ValueError, match="torn"):
    loop.run_until_complete(reading._ToTheEnd().deserialize([]))
  assert ended == [True, True] and not asyncio.all_tasks(loop)
  loop.close()


def test_what_fails_leaves_no_trace_on_stderr(tmp_path, monkeypatch, capfd):
  """One fails at once, while the large ones are being read."""
  state = {
    f"x{i}": jax.random.normal(jax.random.key(i), (1000, 800)) for i in range(6)
  }
  shape = lambda x, dims: jax.ShapeDtypeStruct(
    dims, x.dtype, sharding=x.sharding
  )
  like = {name: shape(x, x.shape) for name, x in state.items()}
  with checkpoint.Checkpoints(tmp_path) as saver:
    saver.save(1, state, {}, {})
  # What is never raised anywhere, with no filter of the house before it.
  seen = []
  monkeypatch.setattr("sys.unraisablehook", seen.append)
  folder = tmp_path / "checkpoints" / "1" / "state"
  with pytest.raises(reading.DAMAGE, match="not compatible"):
    reading.arrays(folder, {**like, "x2": shape(state["x2"], (7, 800))})
  gc.collect()
  time.sleep(0.1)
  gc.collect()
  assert not seen and capfd.readouterr().err == ""
