"""The trace of some steps, and what MFU is measured against."""

import jax
import numpy as np
import pytest

from experiments.cli import named
from nl_jax import build, sharding
from nl_jax.aot import chips
from nl_jax.train import files, progress, timer
from nl_jax.train import settings as settings_lib
from tests.train import stub


@pytest.fixture
def one_device() -> jax.sharding.Mesh:
  return sharding.mesh(devices=jax.devices()[:1])


def traces(workdir):
  return sorted((workdir / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["10", "13:10", "0:3", "a:b", "1:2:3"])
def test_a_wrong_value_is_one_sentence(text):
  with pytest.raises(ValueError, match="train.profile_steps .* as 10:13"):
    settings_lib.Settings(steps=20, profile_steps=text)


def test_steps_are_traced_once_and_change_no_number(
  tmp_path, one_device, monkeypatch
):
  plain = stub.run(tmp_path / "a", mesh=one_device)
  data, turns = stub.Data(), []

  def watched(function):
    def call(*args, **kwargs):
      turns.append(data.index)
      return function(*args, **kwargs)

    return call

  for name in ("start_trace", "stop_trace"):
    real = getattr(jax.profiler, name)
    monkeypatch.setattr(jax.profiler, name, watched(real))
  traced = stub.run(
    tmp_path / "b", data=data, mesh=one_device, profile_steps="3:5"
  )
  # Two batches drawn before, five at the end: steps 3, 4 and 5 between.
  assert turns == [2, 5]
  assert len(traces(tmp_path / "b")) == 1
  jax.tree.map(np.testing.assert_array_equal, plain.state, traced.state)


def test_a_run_that_ends_inside_writes_what_there_is(tmp_path, one_device):
  stub.run(tmp_path, mesh=one_device, profile_steps="9:12")
  assert len(traces(tmp_path)) == 1


def test_steps_that_are_made_are_not_traced_again(tmp_path, one_device):
  stub.run(tmp_path, mesh=one_device, steps=6)
  stub.run(tmp_path, mesh=one_device, steps=10, profile_steps="6:8")
  assert not (tmp_path / "profile").exists()
  with pytest.raises(ValueError, match="begins after train.steps=10"):
    settings_lib.Settings(steps=10, profile_steps="11:12")


@pytest.mark.parametrize("name", ["profile", "profile/plugins"])
def test_a_trace_that_cannot_be_written(tmp_path, one_device, name):
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_text("")
  with pytest.raises(files.StorageError, match="profile cannot be written"):
    stub.run(tmp_path, mesh=one_device, profile_steps="2:3")


@pytest.mark.parametrize("kind,rate", [
  ("TPU v4", 275e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5", 459e12),
  ("TPU v6 lite", 918e12),
  ("TPU v4 lite", 0),
  ("NVIDIA A100-SXM4-80GB", 312e12),
  ("NVIDIA H100 80GB HBM3", 989e12),
  ("NVIDIA H100 PCIe", 756e12),
  ("NVIDIA L40S", 362e12),
  ("NVIDIA L40", 0),
  ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0),
  ("cpu", 0),
])  # fmt: skip
def test_the_peak_of_a_device(kind, rate):
  assert progress.peak(kind) == rate


def test_peaks_are_those_of_the_compile_reports():
  kinds = dict(v4="TPU v4", v5e="TPU v5 lite", v5p="TPU v5", v6e="TPU v6 lite")
  for name, kind in kinds.items():
    assert progress.peak(kind) == chips.CHIPS[name].flops
  # Two devices a chip.
  assert 2 * progress.peak("TPU7x") == chips.CHIPS["tpu7x"].flops


def test_mfu_where_the_peak_is_known(monkeypatch):
  monkeypatch.setattr(progress, "peak", lambda kind: 1000.0)
  rates = progress.Rates(20, 100, flops_per_token=30.0)
  got = rates.read(10, timer.Interval(5, 10.0, 1.0))
  devices = jax.device_count()
  assert got["perf/mfu"] == pytest.approx(50 * 30 / (1000 * devices))
  assert got["perf/model_flops_per_token"] == 30


def test_no_mfu_is_said_once(tmp_path, one_device, monkeypatch):
  said = []
  monkeypatch.setattr(
    progress.Display, "say", lambda _, text: said.append(text)
  )
  stub.run(tmp_path, mesh=one_device, flops_per_token=30.0)
  told = [x for x in said if "MFU" in x]
  assert told == ["no MFU: the peak rate of 'cpu' is not known"]
  text = (tmp_path / "metrics.jsonl").read_text()
  assert "mfu" not in text and "flops" not in text


def test_names_in_a_trace_tell_levels_apart():
  config = build.resolve(named.load_config("hope_tiny:smoke"))
  net = build.model(config)
  made = build.make_optimizer(config, net)
  params = jax.eval_shape(net.init, jax.random.key(0))
  opt = jax.eval_shape(made.tx.init, params)
  tokens = jax.ShapeDtypeStruct((1, 16), np.int32)
  step = lambda params, opt, tokens: (
    net.apply(params, tokens)[0], made.tx.update(params, opt, params)
  )  # fmt: skip
  text = jax.jit(step).lower(params, opt, tokens).as_text(debug_info=True)
  for name in ("generators", "mixer/memory", "CMS/high", "CMS/low", "output",
               "cms/mid"):  # fmt: skip
    assert f"{name}/" in text, name
