"""What a user sees of a run: one line a logged step, a bar on a terminal.

step 1200/50000 loss 3.214 lr 6.0e-04 gnorm 0.80 tok/s 412k (12.9k/dev)
MFU 41% 0.64 s/step data 2% ETA 8h12m
"""

import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping

import jax
import rich.console
import rich.progress
from absl import logging

from nl_jax.train import timer as timers

# Dense bfloat16 operations per second of a device, as its maker states them;
# each chip of the last TPU is two devices.
_TPUS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12 / 2,
}
# Names continue with the size of the memory, say.
_GPUS = {
  "NVIDIA A10": 125e12,
  "NVIDIA A100": 312e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA GeForce RTX 4090": 165e12,
  "NVIDIA GH200": 989e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H200": 989e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40S": 362e12,
}


def peak(kind: str) -> float:
  """Operations per second of a device at most; 0: not known.

  Args:
    kind: `device_kind` of the device.
  """
  if kind in _TPUS:
    return _TPUS[kind]
  # A part of a GPU has not the rate of the whole.
  known = [n for n in _GPUS if re.match(rf"{n}(?!\w)(?!.*\bMIG\b)", kind)]
  return _GPUS[max(known, key=len)] if known else 0.0


class Rates:
  """Speed of a run, from intervals of its timer.

  Attributes:
    peak: operations per second of all devices at most; 0: not known.
  """

  def __init__(
    self, steps: int, tokens_per_step: int, flops_per_token: float = 0.0
  ):
    """Args: updates of the run, slots of a batch, operations of a token."""
    self._steps = steps
    self._tokens = tokens_per_step
    self.peak = peak(jax.devices()[0].device_kind) * jax.device_count()
    self._flops = flops_per_token

  def read(self, step: int, interval: timers.Interval) -> dict[str, float]:
    """perf/… of the steps since the last reading; {} if there were none."""
    if not interval.steps:
      return {}
    seconds = interval.seconds / interval.steps
    speed = self._tokens / seconds
    rates = {
      "perf/tokens_per_s": speed,
      "perf/tokens_per_s_per_device": speed / jax.device_count(),
      "perf/step_seconds": seconds,
      "perf/data_wait": interval.waiting / interval.seconds,
      "perf/eta_seconds": (self._steps - step) * seconds,
      "perf/peak_memory_gib": _peak_memory() / 2**30,
    }
    if self.peak and self._flops:
      rates["perf/mfu"] = speed * self._flops / self.peak
      rates["perf/model_flops_per_token"] = self._flops
    return rates


def _peak_memory() -> int:
  """Bytes that this process has held at most, on the host."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def line(step: int, steps: int, values: Mapping[str, float]) -> str:
  """The line of a step."""
  parts = [
    f"step {step}/{steps}",
    f"loss {values['train/loss']:.3f}",
    f"lr {values['opt/learning_rate']:.1e}",
    f"gnorm {values['opt/grad_norm']:.2f}",
  ]
  if "perf/tokens_per_s" in values:
    total = short(values["perf/tokens_per_s"])
    each = short(values["perf/tokens_per_s_per_device"])
    parts.append(f"tok/s {total} ({each}/dev)")
    if "perf/mfu" in values:
      parts.append(f"MFU {values['perf/mfu']:.0%}")
    parts += [
      f"{values['perf/step_seconds']:.2g} s/step",
      f"data {values['perf/data_wait']:.0%}",
      f"ETA {duration(values['perf/eta_seconds'])}",
    ]
  return " ".join(parts)


def short(value: float) -> str:
  """Three digits and a unit: 412k, 1.2M."""
  for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= size:
      return f"{value / size:.3g}{unit}"
  return f"{value:.3g}"


def duration(seconds: float) -> str:
  """8h12m, 3m05s or 42s."""
  seconds = round(seconds)
  hours, rest = divmod(seconds, 3600)
  minutes, rest = divmod(rest, 60)
  if hours:
    return f"{hours}h{minutes:02d}m"
  return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Display:
  """Shows lines, and a bar below them where stderr is a terminal.

  Only process 0 shows anything. A context manager.
  """

  def __init__(self, step: int, steps: int):
    """Args: updates made and updates of the run."""
    self._steps = steps
    self._bar = None
    if jax.process_index() == 0 and sys.stderr.isatty():
      console = rich.console.Console(stderr=True)
      columns = (
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TextColumn("{task.description}"),
      )
      self._bar = rich.progress.Progress(
        *columns, console=console, transient=True
      )
      self._task = self._bar.add_task("", total=steps, completed=step)

  def __enter__(self) -> "Display":
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *error: object) -> None:
    if self._bar:
      self._bar.stop()

  def step(self, step: int, values: Mapping[str, float] | None = None) -> None:
    """Moves the bar; a line where there are values."""
    text = line(step, self._steps, values) if values else None
    if self._bar:
      self._bar.update(self._task, completed=step, description=text)
    elif text:
      self.say(text)

  def say(self, text: str) -> None:
    """One line that stays."""
    if jax.process_index():
      return
    if self._bar:
      self._bar.console.print(text, highlight=False, markup=False)
    else:
      logging.info("%s", text)


class Heartbeat:
  """Says what a run is at when nothing has moved for long; a context manager.

  The first word comes after `patience` seconds, the next ones after twice as
  long each.
  """

  def __init__(self, say: Callable[[str], None], patience: float = 60.0):
    """Args: what shows a line, and seconds without a beat."""
    self._say, self._patience = say, patience
    self._beat = ("starting", time.monotonic())
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> "Heartbeat":
    self._thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    self._ended.set()
    self._thread.join()

  def beat(self, what: str) -> None:
    """The run moves on to something else."""
    self._beat = (what, time.monotonic())

  def _watch(self) -> None:
    told, limit = None, self._patience
    while not self._ended.wait(self._patience / 4):
      beat = self._beat
      if beat is not told:
        limit = self._patience
      still = time.monotonic() - beat[1]
      if still >= limit:
        self._say(f"still {beat[0]}, for {duration(still)} now")
        told, limit = beat, 2 * limit
