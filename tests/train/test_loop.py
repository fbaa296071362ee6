"""The loop: resume, order, signals, what is not finite."""

import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

from nl_jax import sharding
from nl_jax.train import loop, step
from tests.train import stub


@pytest.fixture
def one_device() -> jax.sharding.Mesh:
  return sharding.mesh(devices=jax.devices()[:1])


def lines(workdir: pathlib.Path) -> list[dict]:
  """metrics.jsonl without what depends on the clock."""
  text = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {
      k: v
      for k, v in json.loads(line).items()
      if k != "wall_time" and not k.startswith("perf/")
    }
    for line in text
  ]


def assert_same(a: loop.Result, b: loop.Result) -> None:
  jax.tree.map(np.testing.assert_array_equal, a.state, b.state)


def stop_at(step: int, signum: int):
  """A hook of the data: signals when the batch of a step is drawn."""
  return lambda i: os.kill(os.getpid(), signum) if i == step else None


@pytest.mark.parametrize(
  ("signum", "status"),
  [(signal.SIGTERM, "preempted"), (signal.SIGINT, "interrupted")],
)
def test_stopped_and_resumed_equals_uninterrupted(
  tmp_path, one_device, signum, status
):
  common = dict(
    mesh=one_device,
    evaluate=stub.evaluate,
    eval_every=3,
    checkpoint_every=0,
    optim={"reduce": "sum"},
  )
  whole = stub.run(
    tmp_path / "a", model=stub.Model((64, 128)), data=stub.Data(), **common
  )
  assert whole.status == "done" and whole.step == 10
  model = stub.Model((64, 128))
  data = stub.Data(hook=stop_at(5, signum))
  half = stub.run(tmp_path / "b", model=model, data=data, **common)
  assert (half.status, half.step) == (status, 6)
  assert not (tmp_path / "b" / "results.json").exists()
  rest = stub.run(tmp_path / "b", model=stub.Model((64, 128)), **common)
  assert rest.status == "done"
  assert_same(whole, rest)
  assert lines(tmp_path / "a") == lines(tmp_path / "b")
  evals = [x["step"] for x in lines(tmp_path / "b") if "eval/norm" in x]
  assert evals == [3, 6, 9, 10]
  results = [
    json.loads((tmp_path / x / "results.json").read_text()) for x in "ab"
  ]
  assert results[0]["metrics"].keys() == results[1]["metrics"].keys()


def test_second_interrupt_is_not_needed_and_handlers_come_back(
  tmp_path, one_device
):
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  data = stub.Data(hook=stop_at(2, signal.SIGTERM))
  stub.run(tmp_path, data=data, mesh=one_device)
  after = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  assert before == after


def test_finished_run_stays_as_it_is(tmp_path, one_device):
  first = stub.run(tmp_path, mesh=one_device, evaluate=stub.evaluate)
  text = (tmp_path / "metrics.jsonl").read_bytes()
  model = stub.Model()
  again = stub.run(
    tmp_path, model=model, mesh=one_device, evaluate=stub.evaluate
  )
  assert model.traces == 0
  assert (tmp_path / "metrics.jsonl").read_bytes() == text
  assert_same(first, again)
  assert again.metrics["eval/norm"] == first.metrics["eval/norm"]


def test_lines_have_steps_tokens_and_memory_means(tmp_path, one_device):
  stub.run(tmp_path, mesh=one_device, log_every=4)
  got = lines(tmp_path)
  assert [line["step"] for line in got] == [1, 4, 8, 10]
  assert [line["tokens"] for line in got] == [32, 128, 256, 320]
  last = got[-1]
  assert last["memory/memory/inner_loss"] == pytest.approx(1)
  assert last["memory/memory/eta_mean"] == pytest.approx(4)
  assert last["memory/memory/alpha_mean"] == pytest.approx(5)
  assert last["train/weight"] == 31
  assert got[0]["train/loss"] > last["train/loss"]
  assert "memory/memory/memory_norm" in last


def test_one_trace_and_one_fetch_a_step(tmp_path, one_device, monkeypatch):
  fetched = []
  real = jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(1) or real(x))
  model = stub.Model()
  stub.run(tmp_path, model=model, mesh=one_device, checkpoint_every=0)
  assert model.traces == 1
  # Orbax fetches what it saves, once at the end here.
  assert 10 <= len(fetched) <= 11


def test_implicit_transfers_in_the_loop_raise(tmp_path, one_device):
  class Careless(stub.Data):
    def __next__(self):
      jax.numpy.sin(np.ones(3, np.float32))  # From host to device, unsaid.
      return super().__next__()

  with pytest.raises(Exception, match="(?i)disallowed host-to-device"):
    stub.run(tmp_path, data=Careless(), mesh=one_device)


def test_metrics_are_handled_one_step_late_but_before_a_save(
  tmp_path, one_device, monkeypatch
):
  events = []
  real = loop._Run._save

  def save(self, state, i):
    events.append(("save", i, self.pending is None))
    real(self, state, i)

  monkeypatch.setattr(loop._Run, "_save", save)
  written = lambda: sum(
    line["step"] > 0 for line in lines(tmp_path)
  )  # fmt: skip
  data = stub.Data(hook=lambda i: events.append(("draw", i, written())))
  stub.run(
    tmp_path, data=data, mesh=one_device, log_every=1, checkpoint_every=4
  )
  # When batch i is drawn step i-1 is under way, and handled are those before.
  drawn = {i: n for what, i, n in events if what == "draw"}
  assert drawn == {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 4, 6: 5, 7: 6, 8: 8, 9: 8}
  saves = [(i, clean) for what, i, clean in events if what == "save"]
  assert saves == [(4, True), (8, True), (10, True)]


def test_not_finite_raises_with_a_report(tmp_path, one_device):
  data = stub.Data(spikes=(5,))
  with pytest.raises(loop.NonFiniteError, match="step 6 is not finite"):
    stub.run(tmp_path, data=data, mesh=one_device)
  report = json.loads((tmp_path / "nan_step_6.json").read_text())
  assert report["rows"] == [2]
  assert report["first_not_finite"]["where"] == "logits"
  assert report["first_not_finite"]["index"][:2] == [2, 1]
  with np.load(tmp_path / "nan_step_6.npz") as saved:
    np.testing.assert_array_equal(saved["inputs"], stub.batch(5)["inputs"])
  # The run resumes from the checkpoint before, and meets it again.
  assert [line["step"] for line in lines(tmp_path)][-1] == 6
  with pytest.raises(loop.NonFiniteError):
    stub.run(tmp_path, data=stub.Data(spikes=(5,)), mesh=one_device)


def test_not_finite_raises_before_it_is_saved(tmp_path, one_device):
  with pytest.raises(loop.NonFiniteError):
    stub.run(
      tmp_path,
      data=stub.Data(spikes=(3,)),
      mesh=one_device,
      checkpoint_every=4,
    )
  assert not any((tmp_path / "checkpoints").glob("[0-9]*"))


def test_skip_leaves_state_and_counts(tmp_path, one_device):
  common = dict(mesh=one_device, nan_policy="skip", checkpoint_every=5)
  result = stub.run(tmp_path, data=stub.Data(spikes=(4, 6)), **common)
  assert int(result.state["skipped"]) == 2
  assert int(result.state["step"]) == 10
  assert result.metrics["skipped"] == 2
  assert all(
    np.isfinite(x).all() for x in jax.tree.leaves(result.state["params"])
  )


def test_skipped_steps_beyond_the_limit_raise(tmp_path, one_device):
  with pytest.raises(loop.NonFiniteError, match="step 7 "):
    stub.run(
      tmp_path,
      data=stub.Data(spikes=(4, 6)),
      mesh=one_device,
      nan_policy="skip",
      max_skipped=1,
    )


def test_resume_on_another_mesh(tmp_path, one_device):
  whole = stub.run(tmp_path / "a", mesh=one_device)
  data = stub.Data(hook=stop_at(4, signal.SIGTERM))
  first = sharding.mesh(fsdp=4, tensor=2)
  stub.run(tmp_path / "b", data=data, mesh=first)
  second = sharding.mesh(replica=2, fsdp=2, tensor=2)
  rest = stub.run(tmp_path / "b", mesh=second)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, whole.state["params"], rest.state["params"])


def test_state_keeps_its_shardings(tmp_path):
  mesh = sharding.mesh(fsdp=4, tensor=2)
  result = stub.run(tmp_path, mesh=mesh, steps=2)
  spec = result.state["params"]["embed"].sharding.spec
  assert spec == jax.sharding.PartitionSpec("tensor", "fsdp")


def test_run_without_jit(tmp_path, one_device):
  with jax.disable_jit():
    result = stub.run(tmp_path, mesh=one_device, steps=1)
  assert result.step == 1


def test_beyond_the_last_step_is_refused(tmp_path, one_device):
  stub.run(tmp_path, mesh=one_device)
  with pytest.raises(ValueError, match="beyond train.steps=4"):
    stub.run(tmp_path, mesh=one_device, steps=4)


@pytest.mark.parametrize(
  ("key", "value", "text"),
  [
    ("steps", 0, "train.steps must be a whole number from 1"),
    ("accumulate", 3, "train.accumulate"),
    ("nan_policy", "ignore", "raise, skip"),
    ("keep", 0, "checkpoint.keep"),
  ],
)
def test_bad_settings(tmp_path, one_device, key, value, text):
  with pytest.raises(ValueError, match=text):
    stub.run(tmp_path, mesh=one_device, **{key: value})
  assert not list(tmp_path.iterdir())


def test_batch_dtypes_are_those_of_the_contract():
  assert set(step.BATCH_DTYPES) == set(stub.batch())
