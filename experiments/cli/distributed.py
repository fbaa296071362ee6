"""Several processes of one command: they find each other and end together.

On a TPU slice, on GKE, under Slurm or Open MPI the command is typed on all
workers as it is, and jax finds the others. Elsewhere --coordinator,
--process_id and --process_count say who they are. A process that fails tells
the others why; one that dies is missed after --heartbeat_timeout.
"""

import atexit
import contextlib
import ctypes
import hashlib
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from absl import flags

S, T = TypeVar("S"), TypeVar("T")
_FLAGS = ("coordinator", "process_id", "process_count")
# Set by launchers that jax knows.
_LAUNCHERS = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri")
_TPU = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_ALONE = "coordinator_address should be defined."  # What jax says of none.
_STOPPED = "nl_jax/stopped"  # Key of the first process's last words.
_PATIENCE = 3.0  # Seconds that last words take to be heard.
# Process 0 writes sample and report while the others wait at the exit.
_SHUTDOWN = 1800
_AGAIN = (
  "start the same command on all of them again: it resumes from the newest "
  "checkpoint"
)


class _Asked(NamedTuple):
  """The flags: host:port of process 0, this process, their number."""

  coordinator: str
  process_id: int
  process_count: int


def define_flags() -> None:
  """Defines the flags of a command that several processes may run."""
  flags.DEFINE_string(
    "coordinator",
    "",
    "host:port of process 0, where jax cannot find the processes by itself.",
  )
  flags.DEFINE_integer("process_id", None, "This process, from 0.")
  flags.DEFINE_integer("process_count", None, "Processes of the command.")
  flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "Seconds in which the others have ended when a process dies.",
    lower_bound=5,
  )
  flags.DEFINE_integer(
    "start_timeout",
    300,
    "Seconds in which all processes must have started.",
    lower_bound=1,
  )


def initialize(*, preemption: bool = False) -> None:
  """Joins the other processes, if there are any; touches no device before.

  Args:
    preemption: SIGTERM to one asks all to save and end (the train loop);
      otherwise it ends the process.

  Raises:
    ValueError: flags that do not fit, or processes that do not come.
  """
  asked = _asked()
  if asked is None and not _launched():
    return
  import jax

  jax.config.update("jax_enable_preemption_service", preemption)
  limit = flags.FLAGS.start_timeout
  deadline = time.monotonic() + limit
  if asked and asked.process_id:
    _await(asked.coordinator, deadline)
  _Abort.install(
    f"error: not all processes came within --start_timeout={limit} s: start "
    "the command on all workers (gcloud ... --worker=all)"
  )
  address, process, count = asked or (None, None, None)
  try:
    with _muted():
      jax.distributed.initialize(
        address,
        count,
        process,
        initialization_timeout=limit,
        # What is left of it is for the end.
        heartbeat_timeout_seconds=flags.FLAGS.heartbeat_timeout * 4 // 5,
        shutdown_timeout_seconds=_SHUTDOWN,
      )
  except ValueError as error:
    if asked is None and str(error) == _ALONE:
      return
    raise
  except RuntimeError as error:
    raise ValueError(
      f"the processes cannot be joined: {_first_line(error)}"
    ) from error
  _join(jax)


def _asked() -> _Asked | None:
  """The three flags; None where none is given, or for one process."""
  values = {name: flags.FLAGS[name].value for name in _FLAGS}
  given = [name for name, x in values.items() if x not in (None, "")]
  if not given:
    return None
  if len(given) < len(_FLAGS):
    missing = ", ".join(f"--{x}" for x in _FLAGS if x not in given)
    raise ValueError(
      f"--coordinator, --process_id and --process_count go together; {missing} "
      "is missing"
    )
  asked = _Asked(**values)
  if asked.process_count < 1:
    raise ValueError(
      f"--process_count must be at least 1, got {asked.process_count}"
    )
  if not 0 <= asked.process_id < asked.process_count:
    raise ValueError(
      f"--process_id must be in [0, {asked.process_count}), which is "
      f"--process_count, got {asked.process_id}"
    )
  host, _, port = asked.coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise ValueError(
      f"--coordinator must be host:port, got {asked.coordinator!r}"
    )
  return asked if asked.process_count > 1 else None


def _launched() -> bool:
  """Whether it is worth asking jax for other processes."""
  if any(name in os.environ for name in _LAUNCHERS):
    # Joining would leave a lone process one of its GPUs.
    tasks = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    return any(os.environ.get(name, "1") != "1" for name in tasks)
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    return False
  hosted = any(name in os.environ for name in _TPU)
  return hosted or importlib.util.find_spec("libtpu") is not None


def _await(coordinator: str, deadline: float) -> None:
  """Waits until process 0 answers; jax would abort with a stack trace."""
  host, _, port = coordinator.rpartition(":")
  reason = "it has not started"
  while time.monotonic() < deadline:
    left = max(deadline - time.monotonic(), 0.1)
    try:
      socket.create_connection((host.strip("[]"), int(port)), left).close()
      return
    except OSError as error:
      reason = error.strerror or str(error)
      time.sleep(0.2)
  raise ValueError(
    f"process 0 does not answer at --coordinator={coordinator} ({reason}): "
    "start it, and see that the port is open between the hosts"
  )


@contextlib.contextmanager
def _muted() -> Iterator[None]:
  """Nothing on stderr: jax's own library writes a stack trace there."""
  sys.stderr.flush()
  kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  _Abort.stderr = kept
  os.dup2(nothing, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    _Abort.stderr = 2
    os.close(kept)
    os.close(nothing)


class _Abort:
  """jax aborts when another process is gone: a sentence, and status 1.

  A handler of Python's would run when the main thread comes back to Python,
  which is never: abort() ends the process when the handler returns.
  """

  text = ""
  status = 1
  stderr = 2
  _handler: Any = None  # Kept: C calls it.

  @classmethod
  def install(cls, text: str) -> None:
    """Says the text from now on."""
    cls.text = text
    if cls._handler is None:
      cls._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(cls._aborted)
      ctypes.CDLL(None).signal(int(signal.SIGABRT), cls._handler)

  @classmethod
  def _aborted(cls, signum: int) -> None:
    del signum
    os.write(cls.stderr, f"{cls.text}\n".encode() if cls.text else b"")
    os._exit(cls.status)


class _Others:
  """The other processes: receives their last messages, sends ours."""

  def __init__(self, client: Any, process: int, count: int):
    """Args: jax's client, this process, their number."""
    self._client, self.process, self.count = client, process, count
    self._checks = 0
    self._speaking = threading.Lock()  # Held for good by who ends us.
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()
    # Before jax leaves its service, which is registered first.
    atexit.register(self._close)

  def _close(self) -> None:
    self._over.set()
    self._thread.join()

  def _listen(self) -> None:
    while not self._over.wait(1.0):
      self.hear()

  def hear(self) -> None:
    """Ends this process with the words of one that has stopped, if any."""
    import jax

    try:
      said = self._client.key_value_try_get(_STOPPED)
    except jax.errors.JaxRuntimeError:
      return  # Nobody has stopped.
    status, who, why = said.split(" ", 2)
    if int(who) != self.process and self._speaking.acquire(blocking=False):
      _end(f"error: process {who} has stopped: {why}", int(status))

  def tell(self, why: str, status: int) -> None:
    """Says why this process ends, and ends it."""
    import jax

    self._speaking.acquire()
    _Abort.text, _Abort.status = "", status  # It is said already.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(_STOPPED, f"{status} {self.process} {why}")
    if not self.process:
      time.sleep(_PATIENCE)  # What they hear by ends with process 0.
    _end("", status)

  def check_same(self, what: str, text: str) -> None:
    """See `check_same`."""
    self._checks += 1
    key = f"nl_jax/same/{self._checks}"
    if not self.process:
      self._client.key_value_set(key, text)
      return
    limit = 1000 * flags.FLAGS.start_timeout
    first = self._client.blocking_key_value_get(key, limit)
    if first != text:
      raise ValueError(
        f"process {self.process} has another {what} than process 0 "
        f"({text[:60]!r}, there {first[:60]!r}); start the same command on "
        "the same files everywhere"
      )


_others: _Others | None = None


def _join(jax: Any) -> None:
  """After jax has found the others."""
  global _others
  # Not public; orbax and jax.experimental take it from there too.
  from jax._src import distributed

  process, count = jax.process_index(), jax.process_count()
  print(
    f"process {process}/{count}, {jax.local_device_count()} local / "
    f"{jax.device_count()} global devices, {jax.devices()[0].device_kind}",
    file=sys.stderr,
    flush=True,
  )
  if count == 1:
    return
  _Abort.install(
    f"error: process {process} of {count} has lost another one, which died or "
    f"was cut off; {_AGAIN}"
  )
  _others = _Others(distributed.global_state.client, process, count)
  if process:
    from absl import logging

    logging.set_verbosity(logging.WARNING)  # Process 0 tells the rest.


def first() -> bool:
  """Whether this is process 0, which alone prints and writes."""
  return _others is None or not _others.process


def check_same(what: str, text: str) -> None:
  """Raises ValueError on a process whose text is not that of process 0.

  Args:
    what: a name for it; all processes call, in the same order.
    text: short.
  """
  if _others:
    _others.check_same(what, text)


def agreed(make: Callable[[], T], digest: Callable[[T], str]) -> T:
  """What all processes have made alike; where one fails, all do.

  Args:
    make: a file is read, or the like; all processes call.
    digest: of what was made, to compare.

  Raises:
    ValueError: another process failed, or made something else.
    Exception: what `make` raises here.
  """
  if _others is None:
    return make()
  from jax.experimental import multihost_utils

  found, text = None, ""
  try:
    found = make()
    text = digest(found)
    return found
  finally:
    # In a failure, too: the others wait for our digest.
    hashed = hashlib.sha256(text.encode()).digest()
    mine = np.frombuffer(hashed, np.uint8).astype(np.int32)
    all_PxN = multihost_utils.process_allgather(mine)
    odd = np.flatnonzero((all_PxN != mine).any(1))
    if text and odd.size:
      raise ValueError(
        f"process {odd[0]} has another file than process {_others.process}, or "
        "none; give all processes the same"
      )


def together(compute: Callable[[S], T]) -> Callable[[S], T]:
  """The same function, whose failure on devices ends all processes.

  The others wait in it: what came next could not be done together.
  """

  def called(x: S) -> T:
    import jax

    try:
      return compute(x)
    except jax.errors.JaxRuntimeError as error:
      if sentence := lost(error):
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        leave(sentence, 1)
      raise

  return called


def lost(error: RuntimeError) -> str | None:
  """The sentence for an error of a computation that others take part in.

  Ends this process where another one has said why it stopped.
  """
  import jax

  if _others is None or not isinstance(error, jax.errors.JaxRuntimeError):
    return None
  limit = time.monotonic() + _PATIENCE
  while time.monotonic() < limit:
    _others.hear()
    time.sleep(0.2)
  return (
    f"process {_others.process} of {_others.count} could not continue with the "
    f"others ({_first_line(error)}): another one has died or was cut off; "
    f"{_AGAIN}"
  )


def leave(why: str, status: int) -> None:
  """Ends this process, where there are others, and sends them the reason.

  Going on to the interpreter's end would wait for them, and they for us.
  """
  if _others:
    _others.tell(" ".join(why.split()), status)


class Together:
  """Errors that no sentence was found for end the process at once, too."""

  def __enter__(self) -> None:
    return None

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if error is not None and _others and not isinstance(error, SystemExit):
      traceback.print_exception(kind, error, trace)
      leave(f"{kind.__name__}: {_first_line(error)}", 1)


def _end(text: str, status: int) -> None:
  if text:
    print(text, file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__
