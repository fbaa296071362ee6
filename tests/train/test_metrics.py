"""metrics.jsonl, the timer, the progress line."""

import json
import math
import threading
import time

import pytest
from tensorboardX.proto import event_pb2

from nl_jax.train import metrics, progress, timer


def write(folder, steps, **arguments) -> None:
  with metrics.Writer(folder, tokens_per_step=8, **arguments) as writer:
    for step in steps:
      writer.write(step, {"train/loss": 1 / (step + 1)})


def steps(folder) -> list[int]:
  text = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in text]


def test_lines_hold_step_tokens_time_and_values(tmp_path):
  write(tmp_path, [1, 2])
  line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
  assert line.pop("wall_time") == pytest.approx(time.time(), abs=60)
  assert line == {"step": 2, "tokens": 16, "train/loss": 1 / 3}


def test_resume_cuts_back_to_the_step(tmp_path):
  write(tmp_path, [1, 2, 3, 4])
  before = (tmp_path / "metrics.jsonl").read_text().splitlines()
  write(tmp_path, [3], step=2)
  after = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert steps(tmp_path) == [1, 2, 3]
  assert after[:2] == before[:2]


def test_no_checkpoint_starts_the_file_again(tmp_path):
  write(tmp_path, [0, 1, 2])
  write(tmp_path, [1])
  assert steps(tmp_path) == [1]


def test_torn_last_line_is_dropped(tmp_path):
  write(tmp_path, [1, 2])
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 2, "tok')
  write(tmp_path, [3], step=2)
  assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("damage", [
  b'\xff\xfe', b'{"step": "2", "tokens": 1, "wall_time": 1}', b"null", b"[2]",
  b'{"step": 1e400, "tokens": 1, "wall_time": 1}', b"[" * 10**5, b"9" * 5000,
  b'{"step": 2}', b'{"step": true, "tokens": 1, "wall_time": 1}',
])  # fmt: skip
def test_a_damaged_line_is_dropped(tmp_path, damage):
  write(tmp_path, [1, 2])
  path = tmp_path / "metrics.jsonl"
  one, two = path.read_bytes().splitlines()
  path.write_bytes(b"\n".join([one, damage, two, b""]))
  write(tmp_path, [3], step=2)
  assert steps(tmp_path) == [1, 2, 3]


def test_last_values_survive_a_resume(tmp_path):
  write(tmp_path, [1, 2, 3])
  with metrics.Writer(tmp_path, step=2) as writer:
    assert writer.last == {"train/loss": 1 / 3}


def test_what_is_not_finite_is_null(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.write(1, {"a": math.nan, "b": math.inf, "c": 2.0})
  line = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert (line["a"], line["b"], line["c"]) == (None, None, 2)


def test_events_hold_the_same_values(tmp_path):
  write(tmp_path, [1, 2])
  write(tmp_path, [2], step=1)
  found = []
  for path in sorted((tmp_path / "events").iterdir()):
    data = path.read_bytes()
    while data:  # length, its checksum, event, its checksum.
      length = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      found += [
        (event.step, v.tag, round(v.simple_value, 4))
        for v in event.summary.value
      ]
  assert (1, "train/loss", 0.5) in found
  assert found.count((2, "train/loss", 0.3333)) == 2


def test_writer_of_other_processes_writes_nothing(tmp_path):
  with metrics.Writer(tmp_path, enabled=False) as writer:
    writer.write(1, {"a": 1.0})
    writer.sync()
    assert writer.last == {"a": 1}
  assert not list(tmp_path.iterdir())


def test_timer_leaves_pauses_out(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  clock = timer.Timer(100.0)
  now[0] += 4
  with clock.pause():
    now[0] += 50
  with clock.wait():
    now[0] += 1
  clock.step()
  assert clock.read() == timer.Interval(1, 5.0, 1.0)
  assert clock.train_seconds == 105
  now[0] += 2
  assert clock.read() == timer.Interval(0, 2.0, 0.0)


def test_a_clock_that_jumps_makes_no_negative_time(monkeypatch):
  now = [1e9]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  clock = timer.Timer()
  now[0] += 4
  for part in (clock.wait, clock.pause):
    with part():
      now[0] -= 31_536_000  # A year.
  clock.step()
  read = clock.read()
  assert read.seconds > 0 and read.waiting == 0
  now[0] += 5
  with clock.wait():
    now[0] += 31_536_000
  read = clock.read()
  assert 0 <= read.waiting <= read.seconds


def test_progress_line():
  values = {
    "train/loss": 3.2141,
    "opt/learning_rate": 6e-4,
    "opt/grad_norm": 0.8,
    "perf/tokens_per_s": 412_000.0,
    "perf/tokens_per_s_per_device": 12_875.0,
    "perf/step_seconds": 0.64,
    "perf/data_wait": 0.02,
    "perf/eta_seconds": 8 * 3600 + 12 * 60.0,
    "perf/mfu": 0.41,
  }
  assert progress.line(1200, 50000, values) == (
    "step 1200/50000 loss 3.214 lr 6.0e-04 gnorm 0.80 tok/s 412k (12.9k/dev) "
    "MFU 41% 0.64 s/step data 2% ETA 8h12m"
  )
  short = {k: v for k, v in values.items() if not k.startswith("perf/")}
  assert progress.line(1, 2, short).endswith("gnorm 0.80")


@pytest.mark.parametrize(
  ("seconds", "text"), [(41.7, "42s"), (185, "3m05s"), (29520, "8h12m")]
)
def test_durations(seconds, text):
  assert progress.duration(seconds) == text


def test_rates_of_an_interval():
  rates = progress.Rates(steps=20, tokens_per_step=100)
  got = rates.read(10, timer.Interval(5, 10.0, 1.0))
  assert got["perf/tokens_per_s"] == 50
  assert got["perf/eta_seconds"] == 20
  assert got["perf/data_wait"] == pytest.approx(0.1)
  assert 0.05 < got["perf/peak_memory_gib"] < 1000
  assert rates.read(10, timer.Interval(0, 1.0, 0.0)) == {}


def test_a_heartbeat_says_what_hangs_and_since_when():
  said = threading.Event()
  lines = []
  say = lambda text: (lines.append(text), said.set())
  with progress.Heartbeat(say, patience=0.02) as heart:
    heart.beat("waiting for the data of step 7")
    assert said.wait(10)
  assert lines[0].startswith("still waiting for the data of step 7, for ")


def test_a_heartbeat_is_silent_while_things_move():
  lines = []
  with progress.Heartbeat(lines.append, patience=5.0) as heart:
    for i in range(20):
      heart.beat(f"computing step {i}")
      time.sleep(0.002)
  assert not lines
