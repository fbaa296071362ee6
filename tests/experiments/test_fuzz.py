"""The fuzz: sixty of its cases, and faults that it must find."""

import re
import subprocess
import sys

from experiments.fuzz import run
from tests.experiments import forked


def test_sixty_cases_end_with_a_sentence_or_the_right_result():
  asked = ["--configs=40", "--files=20", "--commands=0", "--noshapes"]
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-m", "experiments.fuzz", *asked],
    capture_output=True, text=True, cwd=forked.ROOT, timeout=900,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  row = re.search(r"\| all \| 60 \| (\d+) \| (\d+) \| 0 \|", done.stdout)
  assert min(map(int, row.groups())) > 5


def ends(code: str) -> str:
  """The fault of a case that runs some code."""
  made = run.Case("test", code, lambda: exec(code) or "done", 1)
  return run.run(made).fault


def test_what_is_no_good_end_is_found():
  assert not ends("pass")
  assert not ends("raise ValueError('what was given, what fits')")
  assert not ends("raise SystemExit('what was given')")
  assert ends("raise KeyError('x')") == "a traceback"
  assert ends("raise ValueError('one line' + chr(10) + 'and one')")
  assert ends("raise ValueError('')")
  assert ends("import os; os.kill(os.getpid(), 9)") == "killed by SIGKILL"
  assert ends("while True: pass") == "it did not end"
  assert ends("import os; os._exit(0)") == "nothing was said"
