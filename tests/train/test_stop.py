"""Signals: flags only, and the second Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading

from nl_jax.train import stop

_TWICE = """
import os, signal, time
from nl_jax.train import stop
with stop.listen():
  os.kill(os.getpid(), signal.SIGINT)
  print("one", flush=True)
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(5)
"""


def test_signals_set_the_flag_and_nothing_else():
  with stop.listen() as asked:
    assert asked.reason == ""
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked.reason == stop.PREEMPTED
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked.reason == stop.PREEMPTED


def test_ctrl_c_after_a_preemption_is_an_interrupt():
  with stop.listen() as asked:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert asked.reason == stop.INTERRUPTED


def test_second_ctrl_c_ends_at_once_with_130():
  done = subprocess.run(
    [sys.executable, "-c", _TWICE], capture_output=True, text=True, timeout=60
  )
  assert (done.returncode, done.stdout) == (130, "one\n")
  assert "Traceback" not in done.stderr


def test_handlers_come_back():
  before = signal.getsignal(signal.SIGTERM)
  with stop.listen(alone=False):
    assert signal.getsignal(signal.SIGTERM) is before
  with stop.listen():
    assert signal.getsignal(signal.SIGTERM) is not before
  assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_may_train():
  seen = []

  def run():
    with stop.listen() as asked:
      seen.append(asked.reason)

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [""]
