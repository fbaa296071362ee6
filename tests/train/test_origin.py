"""Where a run starts from: its workdir, another run, and what is kept of it."""

import shutil

import jax
import numpy as np
import pytest

from nl_jax import sharding
from nl_jax.train import checkpoint, files
from nl_jax.train import origin as origin_lib
from tests.train import stub, test_loop


@pytest.fixture(scope="module")
def one_device() -> jax.sharding.Mesh:
  return sharding.mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def half(one_device, tmp_path_factory):
  """A run of four steps, with checkpoints of 2 and 4."""
  folder = tmp_path_factory.mktemp("half")
  stub.run(folder, mesh=one_device, steps=4, checkpoint_every=2)
  return folder


def names(folder) -> list[str]:
  return sorted(
    str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()
  )


def drawn() -> tuple[stub.Data, list[int]]:
  """Data, and the numbers of the batches that are drawn of them."""
  seen: list[int] = []
  return stub.Data(hook=seen.append), seen


def test_all_is_going_on_in_another_folder(half, one_device, tmp_path):
  before = names(half)
  data, seen = drawn()
  rest = stub.run(
    tmp_path / "rest", mesh=one_device, origin=half, kept="all", steps=6,
    data=data,
  )  # fmt: skip
  assert names(half) == before
  assert rest.step == 6 and seen == [4, 5]
  # The same as going on in the first folder, but for the schedule's end.
  copied = shutil.copytree(half, tmp_path / "copied")
  here = stub.run(copied, mesh=one_device, steps=6)
  jax.tree.map(np.testing.assert_array_equal, rest.state, here.state)
  assert checkpoint.latest_step(str(tmp_path / "rest")) == 6


def test_weights_start_a_run_of_step_0(half, one_device, tmp_path):
  for place, step in ((half, None), (f"{half}@2", 2)):
    params, _ = checkpoint.load_params(str(half), stub.Model(), step=step)
    data, seen = drawn()
    result = stub.run(
      tmp_path / str(step), mesh=one_device, origin=place, kept="weights",
      data=data, steps=1, fingerprint="others",
    )  # fmt: skip
    assert seen == [0] and int(result.state["step"]) == 1
    # One small step away from where it started.
    moved = jax.tree.map(
      lambda a, b: float(np.abs(a - b).max()), params, result.state["params"]
    )
    assert 0 < max(jax.tree.leaves(moved)) < 0.02


def test_optimizer_keeps_all_state_and_begins_other_data(
  half, one_device, tmp_path, caplog
):
  caplog.set_level("INFO", "absl")
  data, seen = drawn()
  # What a slow level has gathered waits in the state too.
  model = lambda: stub.Model((stub.TOKENS, 4 * stub.TOKENS))
  common = dict(mesh=one_device, optim={"reduce": "sum"})
  stub.run(tmp_path / "a", model=model(), steps=3, **common)
  result = stub.run(
    tmp_path / "b", model=model(), steps=5, data=data, fingerprint="others",
    origin=tmp_path / "a", kept="optimizer", **common,
  )  # fmt: skip
  assert seen == [0, 1] and int(result.state["step"]) == 5
  last = [line["tokens"] for line in test_loop.lines(tmp_path / "b")][-1]
  assert last == 5 * stub.TOKENS

  # As if the data had been put in the place of the others.
  class Spliced(stub.Data):
    def __next__(self):
      index, self.index = self.index, self.index - 3 * (self.index >= 3)
      rows = super().__next__()
      self.index = index + 1
      return rows

  copy = shutil.copytree(tmp_path / "a", tmp_path / "copy")
  other = stub.run(copy, model=model(), steps=5, data=Spliced(), **common)
  jax.tree.map(np.testing.assert_array_equal, result.state, other.state)
  about = files.read_about(tmp_path / "b")["chain"]
  assert [(x["step"], x["keep"]) for x in about] == [(3, "optimizer")]
  assert "starting from step 3 of" in caplog.text


def test_three_corpora_a_cooldown_and_a_kill_are_as_if_left_alone(
  one_device, tmp_path
):
  class Killed(Exception):
    pass

  def kill(step):
    def hook(index):
      if index == step:
        raise Killed

    return hook

  def journey(folder, killed):
    """Three corpora, by their fingerprints, then a cooldown of the last."""
    common = dict(mesh=one_device, checkpoint_every=2, log_every=1)
    constant = {"schedule": "constant"}
    folders = [folder / x for x in "abcd"]
    stub.run(folders[0], steps=4, fingerprint="a", optim=constant, **common)
    for i, steps in ((1, 8), (2, 12), (3, 15)):
      more = dict(
        origin=folders[i - 1], kept="all" if i == 3 else "optimizer",
        steps=steps, fingerprint="abcc"[i],
        optim={"schedule": "wsd", "cooldown_steps": 3} if i == 3 else constant,
      )  # fmt: skip
      if killed and i > 1:
        # The cooldown continues in the third corpus, at its fifth batch.
        data = stub.Data(hook=kill(3 if i == 2 else 6))
        with pytest.raises(Killed):
          stub.run(folders[i], data=data, **more, **common)
      result = stub.run(folders[i], **more, **common)
    return result, folders[3]

  whole, left = journey(tmp_path / "whole", False)
  result, folder = journey(tmp_path / "killed", True)
  test_loop.assert_same(whole, result)
  assert test_loop.lines(left) == test_loop.lines(folder)
  rates = [x["opt/learning_rate"] for x in test_loop.lines(folder)]
  np.testing.assert_allclose(rates, [7e-3, 4e-3, 1e-3], rtol=1e-5)
  chain = files.read_about(folder)["chain"]
  assert [x["fingerprint"] for x in chain] == ["a", "b", "c"]
  assert [x["step"] for x in chain] == [4, 8, 12]


def test_the_workdirs_own_checkpoint_comes_first(half, one_device, tmp_path):
  stub.run(tmp_path, mesh=one_device, steps=2)
  data, seen = drawn()
  stub.run(
    tmp_path, mesh=one_device, origin=half, kept="all", data=data, steps=4
  )
  assert seen == [2, 3]


def test_origins_that_do_not_fit(half, one_device, tmp_path):
  new = tmp_path / "new"
  for text, change in (
    ("trained on other data .* --keep=optimizer keeps all else",
     dict(kept="all", fingerprint="g")),
    ("no checkpoint in", dict(origin=tmp_path, kept="all")),
    (r"no checkpoint of step 3 in .*; there are \[2, 4\]",
     dict(origin=f"{half}@3", kept="weights")),
    ("another model or optimizer",
     dict(model=stub.Model((32,) * 2), kept="weights")),
    ("or --keep=weights, which takes its parameters",
     dict(optim={"name": "delta_momentum"}, kept="optimizer")),
    ("is at step 4, and train.steps=4 asks for no more",
     dict(kept="all", steps=4)),
    ("needs --keep, which is weights", dict(kept="")),
    ("needs --keep, .* got 'most'", dict(kept="most")),
    ("--keep=all belongs to --from", dict(origin="", kept="all")),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=text):
      stub.run(new, mesh=one_device, **{"origin": half, **change})
    assert not new.exists()
  with pytest.raises(ValueError, match="is the --workdir itself"):
    origin_lib.check(origin_lib.Origin(str(half), "all"), str(half), "f", {})


def test_a_folder_whose_name_ends_as_a_step_is_that_folder(tmp_path):
  (tmp_path / "x@4").mkdir()
  place = str(tmp_path / "x@4")
  assert origin_lib.parse(place, "all").step is None
  found = origin_lib.parse(f"{place}@12", "all")
  assert (found.workdir, found.step) == (place, 12)


def test_multiples_of_a_period_stay(one_device, tmp_path):
  stub.run(tmp_path, mesh=one_device, checkpoint_every=2, keep=1, keep_period=4)
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert kept == [4, 8, 10]
