"""Runs a command as several processes that find each other.

A server that has imported what the commands need forks a group of processes,
before any device is touched: a second a process, where one of its own takes
several.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.experiments import forked

ROOT = forked.ROOT
_LIMIT = 300  # Seconds of a group, on a machine with other work too.


class Done(NamedTuple):
  """How a process ended.

  Attributes:
    returncode: negative of the signal that killed it.
    stdout, stderr: what it wrote.
    seconds: from the signal that the group was sent, or its start, to its end.
  """

  returncode: int
  stdout: str
  stderr: str
  seconds: float

  @property
  def sentences(self) -> list[str]:
    """What it said was wrong."""
    lines = self.stderr.splitlines()
    return [line for line in lines if line.startswith("error: ")]


class Signal(NamedTuple):
  """What a group is sent.

  Attributes:
    number: of the signal.
    process: that gets it.
    path: a glob; sent once a file of that name is there.
  """

  number: int
  process: int
  path: str


class Server:
  """Starts groups; of `serve`."""

  def __init__(self, process: subprocess.Popen):
    self._process = process

  def run(
    self,
    command: Sequence[str],
    *,
    processes: int = 1,
    devices: int = 1,
    each: Sequence[Sequence[str]] = (),
    send: Signal | None = None,
  ) -> list[Done]:
    """Runs a group to its end.

    Args:
      command: the module below experiments, and its arguments.
      processes: how many; more than one get the flags to find each other.
      devices: of each.
      each: further arguments of each.
      send: a signal to one of them.
    """
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    commands = [[*command] for _ in range(processes)]
    for i, flags in enumerate(commands if processes > 1 else ()):
      flags += [f"--coordinator=localhost:{port}", f"--process_id={i}"]
      flags += [f"--process_count={processes}"]
    for flags, more in zip(commands, each):
      flags += more
    asked = [commands, devices, send]
    self._process.stdin.write(json.dumps(asked) + "\n")
    self._process.stdin.flush()
    ready, _, _ = select.select([self._process.stdout], [], [], _LIMIT + 30)
    assert ready, "the server does not answer"
    line = self._process.stdout.readline()
    assert line, "the server has died"
    return [Done(*x) for x in json.loads(line)]


@contextlib.contextmanager
def serve() -> Iterator[Server]:
  """A server, while the context lasts."""
  process = subprocess.Popen(
    [sys.executable, "-W", "ignore", "-m", "tests.experiments.processes"],
    cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  try:
    yield Server(process)
  finally:
    process.stdin.close()
    process.wait(timeout=30)


def _main() -> None:
  import jax  # noqa: F401
  import matplotlib.backends.backend_agg  # noqa: F401
  import matplotlib.backends.backend_svg  # noqa: F401
  import orbax.checkpoint  # noqa: F401

  import experiments.cli.generation  # noqa: F401
  import nl_jax.build  # noqa: F401
  import nl_jax.data.pipeline  # noqa: F401
  import nl_jax.train.loop  # noqa: F401

  for line in sys.stdin:
    print(json.dumps(_group(*json.loads(line))), flush=True)


def _group(
  commands: list[list[str]], devices: int, send: list | None
) -> list[list]:
  with contextlib.ExitStack() as stack:
    started = []
    for command in commands:
      files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
      pid = os.fork()
      if not pid:
        _child(command, devices, *(file.fileno() for file in files))
      started.append((pid, files))
    begin = time.monotonic()
    pids = [pid for pid, _ in started]
    ended = {}
    while len(ended) < len(pids):
      if send and _there(send[2]):
        os.kill(pids[send[1]], send[0])
        send, begin = None, time.monotonic()
      if time.monotonic() - begin > _LIMIT:
        for pid in {*pids} - {*ended}:
          os.kill(pid, signal.SIGKILL)
      for pid in {*pids} - {*ended}:
        which, status = os.waitpid(pid, os.WNOHANG)
        if which:
          seconds = time.monotonic() - begin
          ended[pid] = os.waitstatus_to_exitcode(status), seconds
      time.sleep(0.01)
    return [_told(*ended[pid], files) for pid, files in started]


def _there(pattern: str) -> bool:
  path = pathlib.Path(pattern)
  return any(path.parent.glob(path.name))


def _told(code: int, seconds: float, files: list) -> list:
  texts = []
  for file in files:
    file.seek(0)
    texts.append(file.read().decode("utf-8", "replace"))
  return [code, *texts, seconds]


def _child(command: list[str], devices: int, out: int, err: int) -> None:
  import jax

  os.dup2(out, 1)
  os.dup2(err, 2)
  jax.config.update("jax_num_cpu_devices", devices)
  code = forked.run_module(command)
  # What a process does at its end: leaves the others.
  import atexit

  atexit._run_exitfuncs()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


if __name__ == "__main__":
  _main()
