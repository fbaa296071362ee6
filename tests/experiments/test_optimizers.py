"""The optimizer comparison: it resumes, and its page shows what was run."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments.optimizers import arms, page, toys
from experiments.optimizers import language_model as lm

_ROOT = pathlib.Path(__file__).parents[2]


def _command(*args):
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)}
  return subprocess.run(
    [sys.executable, "-m", "experiments.optimizers", *args],
    capture_output=True,
    text=True,
    cwd=_ROOT,
    env=env,
    timeout=300,
  )


def test_trials_are_not_run_twice(tmp_path):
  page = tmp_path / "page.md"
  args = ["--suite=lm", "--smoke", f"--folder={tmp_path}"]
  first = _command(*args)
  assert first.returncode == 0, first.stderr
  trials = sorted((tmp_path / "smoke" / "lm").glob("*.json"))
  assert len(trials) == 8  # Two arms at three rates, a second seed at the best.
  lost = trials.pop()
  before = json.loads(lost.read_text())
  lost.unlink()
  again = _command(*args, f"--table={page}")
  assert again.returncode == 0, again.stderr
  assert again.stdout.count(", seed ") == 1
  after = json.loads(lost.read_text())
  assert after["validation"] == before["validation"]
  assert "| muon |" in page.read_text()


def test_a_stream_of_topics_is_measured():
  got = lm.run_topics("m3", 1e-2, 0.9, 0, 2, 16)
  assert set(got) == {"online", "retention", "forgetting", "recovery"}
  assert all(v == v for v in got.values()) and 2 < got["online"] < 6


def test_the_decoder_has_the_stated_size():
  shapes = jax.eval_shape(lm.init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 459_392


@pytest.mark.parametrize("name", arms.STARTS)
def test_a_public_optimizer_takes_all_leaves(name):
  params = jax.eval_shape(lm.init, jax.random.key(0))
  start = arms.STARTS[name]

  def step(params, grads):
    tx = arms.make(name, start.rate, start.b1s[0], lambda count: 1.0)
    return tx.update(grads, tx.init(params), params)[0]

  updates = jax.eval_shape(step, params, params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_the_page_has_the_public_optimizers(tmp_path):
  for seed, value in enumerate((1.5, 1.7)):
    trial = dict(arm="optim.m3", rate=0.01, b1=0.8, seed=seed, text="a text")
    path = tmp_path / "start" / f"s{seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(trial | {"validation": value}))
  made = page.page(tmp_path, tmp_path / "page.png")
  assert "| `optim.m3(0.01)` | 0.8 | 2 | 1.6000 ± 0.1414 |" in made
  assert "a text" in made


def test_an_unwanted_pair_of_flags():
  for args in (("--smoke", "--full"), ("--suite=start", "--full")):
    done = _command(*args)
    assert done.returncode == 1
    assert "--full" in done.stderr and "Traceback" not in done.stderr


def test_toys_show_the_known_verdicts():
  alone, one, many, *_ = toys.recall()
  assert alone["GD"] < 1e-5 and alone["DGD"] < 1e-5
  assert one["DGD"] < one["GD"] and many["DGD"] < one["DGD"] < many["GD"]
  (key,) = toys.overwrite()
  assert key["DGD"] < 1e-5 < 1 < key["GD"]
  (half,) = toys.teacher()
  assert half["GD"] == pytest.approx(1, abs=1e-4)
  assert half["DGD"] == pytest.approx(0.5, abs=1e-4)
  slow, edge, beyond = toys.stability()
  assert slow["DGD"] < 1e-3 and edge["DGD"] < 1 < 1e3 < beyond["DGD"]
