"""Where a run starts from: its workdir, another run, other parameters."""

import shutil

import jax
import numpy as np
import pytest

from nl_jax import sharding
from nl_jax.train import checkpoint
from tests.train import stub


@pytest.fixture(scope="module")
def one_device() -> jax.sharding.Mesh:
  return sharding.mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def half(one_device, tmp_path_factory):
  """A run of four steps."""
  folder = tmp_path_factory.mktemp("half")
  stub.run(folder, mesh=one_device, steps=4)
  return folder


def names(folder) -> list[str]:
  return sorted(
    str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()
  )


def test_another_runs_checkpoint_is_gone_on_from(half, one_device, tmp_path):
  before = names(half)
  rest = stub.run(tmp_path / "rest", mesh=one_device, resume_from=half, steps=6)
  assert names(half) == before
  assert rest.step == 6
  # The same as going on in the first folder, but for the schedule's end.
  copied = shutil.copytree(half, tmp_path / "copied")
  here = stub.run(copied, mesh=one_device, steps=6)
  jax.tree.map(np.testing.assert_array_equal, rest.state, here.state)
  assert checkpoint.latest_step(str(tmp_path / "rest")) == 6


def test_other_parameters_start_a_run_of_step_0(half, one_device, tmp_path):
  params, _ = checkpoint.load_params(str(half), stub.Model())
  data = stub.Data()
  seen = []
  data.hook = seen.append
  result = stub.run(
    tmp_path, mesh=one_device, init_from=half, data=data, steps=1
  )
  assert seen == [0] and int(result.state["step"]) == 1
  # One small step away from where it started.
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), params, result.state["params"]
  )
  assert 0 < max(jax.tree.leaves(moved)) < 0.02


def test_the_workdirs_own_checkpoint_comes_first(half, one_device, tmp_path):
  stub.run(tmp_path, mesh=one_device, steps=2)
  data = stub.Data()
  seen = []
  data.hook = seen.append
  stub.run(tmp_path, mesh=one_device, resume_from=half, data=data, steps=4)
  assert seen == [2, 3]


def test_origins_that_do_not_fit(half, one_device, tmp_path):
  with pytest.raises(ValueError, match="trained with another data"):
    stub.run(tmp_path / "a", mesh=one_device, resume_from=half, fingerprint="g")
  with pytest.raises(ValueError, match="no checkpoint in"):
    stub.run(tmp_path / "b", mesh=one_device, resume_from=tmp_path)
  with pytest.raises(ValueError, match="another model or optimizer"):
    stub.run(
      tmp_path / "c", model=stub.Model((32,) * 2), mesh=one_device,
      init_from=half,
    )  # fmt: skip


def test_multiples_of_a_period_stay(one_device, tmp_path):
  stub.run(tmp_path, mesh=one_device, checkpoint_every=2, keep=1, keep_period=4)
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert kept == [4, 8, 10]
