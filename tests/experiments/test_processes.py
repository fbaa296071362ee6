"""Several processes are one: numbers, resume, death of one, mistakes.

Tolerances are of float32 sums in another order: losses 1e-5 relative, weights
after some steps of Adam 2e-4 of the largest, which is 1e-2 of a step's length.
"""

import json
import os
import pathlib
import shutil
import signal
import types

import jax
import numpy as np
import pytest

from nl_jax import build
from nl_jax.eval import evaluate
from nl_jax.train import checkpoint
from tests.eval import documents
from tests.experiments import processes

HEARTBEAT = 20  # Seconds; the least that leaves room for a loaded machine.
pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="module")
def server():
  with processes.serve() as running:
    yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The runs of this file; documents in `data`, some of them in `less`."""
  place = tmp_path_factory.mktemp("processes")
  documents.write(place / "data", ["piqa", "boolq"])
  documents.write(place / "less", ["piqa"])
  return place


def train(
  folder: pathlib.Path,
  name: str,
  *more: str,
  config: str = "transformer_tiny",
  steps: int = 10**6,
  every: int = 2,
) -> list[str]:
  """A command; its rates depend on no number of steps."""
  cache = os.environ["NL_TEST_CACHE"]
  return [
    "lm", f"--config={config}:smoke", f"--workdir={folder / name}",
    f"--compilation_cache={cache}", f"--config.train.steps={steps}",
    "--config.train.log_every=1", f"--config.checkpoint.every={every}",
    "--config.checkpoint.keep=100", "--config.optim.min_ratio=1.0",
    "--config.eval.batches=3", f"--heartbeat_timeout={HEARTBEAT}", *more,
  ]  # fmt: skip


def succeed(done: list[processes.Done]) -> list[processes.Done]:
  for one in done:
    assert one.returncode == 0, one.stderr[-3000:]
    assert not one.sentences
  return done


def values(run: pathlib.Path, name: str) -> dict[int, float]:
  """A metric by step."""
  lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line[name] for line in lines if name in line}


def assert_same_losses(a: pathlib.Path, b: pathlib.Path, steps: range) -> None:
  a, b = values(a, "train/loss"), values(b, "train/loss")
  found = [[x[step] for step in steps] for x in (a, b)]
  np.testing.assert_allclose(*found, rtol=1e-5)


def assert_same_weights(
  a: pathlib.Path, b: pathlib.Path, step: int, config: str = "transformer_tiny"
) -> None:
  made = checkpoint.read_config(str(a))
  assert made["model"]["arch"] in config
  net = build.model(build.from_plain(made))
  found = [checkpoint.load_params(str(x), net, step=step)[0] for x in (a, b)]

  def check(x: jax.Array, y: jax.Array) -> None:
    np.testing.assert_allclose(x, y, atol=2e-4 * float(np.abs(x).max()))

  jax.tree.map(check, *found)


TASKS = "--config.eval.tasks=('piqa:2','boolq:2')"


@pytest.fixture(scope="module")
def one(server, folder):
  """8 steps in one process of four devices."""
  command = train(
    folder, "one", "--config.train.eval_every=4", TASKS,
    f"--data_dir={folder / 'data'}", steps=8, every=4,
  )  # fmt: skip
  succeed(server.run(command, devices=4))
  return folder / "one"


@pytest.fixture(scope="module")
def two(server, folder):
  """4 steps in two processes; the second one lacks the file of a task."""
  command = train(folder, "two", TASKS, steps=4, every=2)
  each = [[f"--data_dir={folder / name}"] for name in ("data", "less")]
  done = server.run(command, processes=2, devices=2, each=each)
  return folder / "two", succeed(done)


def test_two_processes_equal_one(one, two):
  run, (first, second) = two
  assert_same_losses(one, run, range(1, 5))
  assert_same_weights(one, run, 4)
  for name in ("loss", "ppl", "nat_per_byte"):
    a, b = (values(x, f"eval/validation/{name}")[4] for x in (one, run))
    assert a == pytest.approx(b, rel=1e-5)
  # One process speaks for both.
  assert "process 0/2, 2 local / 4 global devices" in first.stderr
  here, why = second.stderr.splitlines()
  assert here.startswith("process 1/2, 2 local / 4 global devices")
  assert why.startswith("task boolq failed: no file boolq.jsonl")
  assert "total: " in first.stdout and "total: " not in second.stdout
  assert (run / "sample.txt").exists() and "--- sample" in first.stdout
  assert json.loads((run / "results.json").read_text())["step"] == 4


def test_a_task_fails_on_all_where_it_fails_on_one(one, two):
  run, (first, second) = two
  a, b = (values(x, "eval/piqa/acc")[4] for x in (one, run))
  assert a == b
  assert 4 in values(one, "eval/boolq/acc")
  assert values(run, "eval/boolq/failed") == {4: 1.0}
  assert "boolq failed: process 1 has another file than process 0" in (
    first.stderr
  )


def test_goes_on_with_other_processes_and_another_mesh(
  server, folder, one, two
):
  """Two processes share the rows of a half of each batch.

  What the second of two had saved last is torn: some of four find that out,
  and all resume from the checkpoint before.
  """
  shutil.copytree(two[0], folder / "resumed")
  saved = folder / "resumed" / "checkpoints" / "4" / "state"
  for path in saved.glob("ocdbt.process_1/d/*"):
    path.write_bytes(path.read_bytes()[:10])
  command = train(
    folder, "resumed", "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
    "--allow_config_change", steps=8, every=4,
  )  # fmt: skip
  done = succeed(server.run(command, processes=4))
  assert "going on from step 2" in done[0].stderr
  assert (folder / "resumed" / "damaged" / "4").is_dir()
  assert_same_losses(one, folder / "resumed", range(1, 9))
  assert_same_weights(one, folder / "resumed", 8)


def test_four_processes_equal_one_until_one_is_killed(server, folder, one):
  run = folder / "killed"
  done = server.run(
    train(folder, "killed"), processes=4,
    send=processes.Signal(signal.SIGKILL, 2, str(run / "checkpoints" / "4")),
  )  # fmt: skip
  killed = done.pop(2)
  assert killed.returncode == -signal.SIGKILL
  for other in done:
    assert other.returncode == 1
    (sentence,) = other.sentences
    assert "another one" in sentence and "start the same command" in sentence
    assert "Traceback" not in other.stderr
    assert other.seconds < HEARTBEAT
  assert_same_losses(one, run, range(1, 5))
  assert_same_weights(one, run, 4)


def test_process_0_is_killed(server, folder):
  run = folder / "headless"
  killed, other = server.run(
    train(folder, "headless"), processes=2,
    send=processes.Signal(signal.SIGKILL, 0, str(run / "checkpoints" / "2")),
  )  # fmt: skip
  assert (killed.returncode, other.returncode) == (-signal.SIGKILL, 1)
  (sentence,) = other.sentences
  assert sentence == other.stderr.splitlines()[-1]
  assert "another one" in sentence and "start the same command" in sentence
  assert other.seconds < HEARTBEAT


def test_memories_and_what_one_is_told_all_do(server, folder):
  """A config with memories; Ctrl-C to one process has all save and end."""
  config = "hope_linear_tiny"
  runs = []
  for count, number in ((1, signal.SIGTERM), (2, signal.SIGINT)):
    runs.append(folder / f"memories{count}")
    until = str(runs[-1] / "checkpoints" / "4")
    *others, told = server.run(
      train(folder, runs[-1].name, config=config),
      processes=count, devices=2 // count,
      send=processes.Signal(number, count - 1, until),
    )  # fmt: skip
    assert told.returncode == (0 if number == signal.SIGTERM else 130)
    succeed(others)
  assert_same_losses(*runs, range(1, 5))
  assert_same_weights(*runs, 4, config)
  # Saved where they ended.
  last = max(values(runs[1], "train/loss"))
  assert checkpoint.latest_step(str(runs[1])) == last


@pytest.mark.parametrize("flags,sentence", [
  (["--process_id=2", "--process_count=2", "--coordinator=localhost:1"],
   "--process_id must be in [0, 2), which is --process_count, got 2"),
  (["--process_id=-1", "--process_count=2", "--coordinator=localhost:1"],
   "--process_id must be in [0, 2)"),
  (["--process_id=0", "--process_count=0", "--coordinator=localhost:1"],
   "--process_count must be at least 1, got 0"),
  (["--process_id=0", "--process_count=2"],
   "go together; --coordinator is missing"),
  (["--process_id=0", "--process_count=2", "--coordinator=here"],
   "--coordinator must be host:port, got 'here'"),
  (["--process_id=1", "--process_count=2", "--coordinator=localhost:1",
    "--start_timeout=1"],
   "process 0 does not answer at --coordinator=localhost:1 (Connection refused"
   "): start it"),
])  # fmt: skip
def test_mistakes_of_flags(server, folder, flags, sentence):
  (done,) = server.run([*train(folder, "none"), *flags])
  assert done.returncode == 1
  (said,) = done.sentences
  assert sentence in said and "Traceback" not in done.stderr
  assert not (folder / "none").exists()


@pytest.mark.parametrize("more,each,sentence", [
  (["--config.data.batch_size=7", "--config.mesh.fsdp=2"], [],
   "data.batch_size must be a multiple of mesh.replica * mesh.fsdp * "
   "train.accumulate = 2 * 1, got 7; nearest: 6 or 8"),
  ([], [[], ["--config.train.seed=1"]],
   "process 1 has another config than process 0"),
])  # fmt: skip
def test_mistakes_of_all_and_of_one(server, folder, more, each, sentence):
  done = server.run(train(folder, "none", *more), processes=2, each=each)
  for one in done:
    assert one.returncode == 1
    (said,) = one.sentences
    assert sentence in said and "Traceback" not in one.stderr
    assert one.seconds < HEARTBEAT


def test_processes_that_do_not_come(server, folder):
  flags = ["--process_id=0", "--process_count=2", "--start_timeout=2"]
  import socket

  with socket.socket() as free:
    free.bind(("localhost", 0))
    flags.append(f"--coordinator=localhost:{free.getsockname()[1]}")
  (done,) = server.run([*train(folder, "none"), *flags])
  assert done.returncode == 1
  assert done.stderr.splitlines() == [
    "error: not all processes came within --start_timeout=2 s: start the "
    "command on all workers (gcloud ... --worker=all)"
  ]


@pytest.mark.parametrize("shape,local,expected", [
  ((1, 4, 1, 1), 1, [(0, 4), (1, 4), (2, 4), (3, 4)]),
  ((1, 4, 1, 1), 2, [(0, 2), (1, 2)]),
  ((2, 2, 1, 1), 2, [(0, 2), (1, 2)]),
  # Processes that differ in `sequence` and `tensor` alone share rows.
  ((1, 1, 1, 4), 2, [(0, 1), (0, 1)]),
  ((1, 2, 1, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
  ((1, 2, 2, 2), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
  ((2, 2, 1, 2), 4, [(0, 2), (1, 2)]),
  ((1, 4, 1, 1), 4, [(0, 1)]),
])  # fmt: skip
def test_each_process_draws_what_its_devices_hold(
  monkeypatch, shape, local, expected
):
  mesh = fake_mesh(shape, local)
  found = []
  for process in range(len(expected)):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    found.append(build.part_of_batch(mesh))
  assert found == expected


def test_a_batch_cut_unevenly():
  with pytest.raises(ValueError, match="unevenly over 3 processes"):
    build.part_of_batch(fake_mesh((1, 2, 1, 3), 2))


def fake_mesh(shape: tuple[int, ...], local: int) -> types.SimpleNamespace:
  """A mesh over processes of `local` devices each."""
  names = ("replica", "fsdp", "sequence", "tensor")
  devices = np.array([
    types.SimpleNamespace(process_index=i // local)
    for i in range(np.prod(shape))
  ]).reshape(shape)  # fmt: skip
  return types.SimpleNamespace(shape=dict(zip(names, shape)), devices=devices)


@pytest.mark.skipif(
  not evaluate.has_seqio(),
  reason="seqio is not installed: pip install -e .[eval]",
)
def test_table_1_over_two_processes(server, folder, one):
  results = []
  for count in (1, 2):
    out = folder / f"table{count}.json"
    done = succeed(server.run(
      ["table1", f"--workdir={one}", f"--data_dir={folder / 'data'}",
       f"--out={out}", "--batch_tokens=4096", "--tasks=piqa,boolq"],
      processes=count, devices=2 // count,
    ))  # fmt: skip
    results.append(json.loads(out.read_text()))
    assert "result: " in done[0].stdout
    assert all("result: " not in x.stdout for x in done[1:])
  alone, together = results
  assert together["run"]["hosts"] == 2
  assert together["model"]["weights_sha256"] == alone["model"]["weights_sha256"]
  for task, record in alone["tasks"].items():
    for name, metric in record["metrics"].items():
      found = together["tasks"][task]["metrics"][name]["value"]
      assert found == pytest.approx(metric["value"], rel=1e-5)
