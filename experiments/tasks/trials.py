"""Trials: one model, one task, one rate, one seed; a JSON file each.

A trial that lies in the folder is not run again. Its file is named by all that
decides its numbers, so that one of other sizes never stands in for it.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from experiments.cli import command
from experiments.cli import trials as kept
from experiments.tasks import arms, problems, training
from nl_jax.train import environment

VERSION = 1  # Of generators and protocol; a change makes old trials others.


def run(
  task: str, compared: Sequence[arms.Arm], size: problems.Sizes,
  folder: pathlib.Path,
) -> list[dict[str, Any]]:  # fmt: skip
  """All trials of a task, those in the folder included, seed by seed."""
  problem = problems.make(task, size)
  return [
    _trial(task, problem, arm, size, rate, seed, folder)
    for seed in range(size.seeds)
    for arm in compared
    for rate in size.learning_rates
  ]


def protocol(task: str, size: problems.Sizes) -> dict[str, Any]:
  """All that decides a task's numbers but the model, the rate and the seed."""
  values = dataclasses.asdict(size)
  values = {
    k: list(v) if isinstance(v, tuple) else v for k, v in values.items()
  }
  free = ("learning_rates", "seeds")
  kept = {k: v for k, v in values.items() if k not in free}
  return {"task": task, "version": VERSION, **kept}


def known(task: str, size: problems.Sizes, folder: pathlib.Path) -> list[dict]:
  """The trials of a protocol that lie in the folder, by whatever command."""
  asked = protocol(task, size)
  return [t for t in kept.held(folder / task) if t["protocol"] == asked]


def _trial(
  task: str, problem: problems.Problem, arm: arms.Arm, size: problems.Sizes,
  rate: float, seed: int, folder: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
  longest = max(x["inputs"].shape[1] for x in problem.tests.values())
  tokens = size.batch_size * problem.train["inputs"].shape[1]
  net = arms.model(arm, problem.vocab_size, longest, tokens)
  about = {
    "protocol": protocol(task, size),
    "model": arms.described(net),
    "learning_rate": rate,
    "seed": seed,
  }
  path = folder / task / f"{_slug(arm.title)}-{_digest(about)}.json"

  def make() -> kept.Result:
    fitted = training.fit(
      net, problem.train, problem.tests, problems.plan(task, size, rate),
      seed=seed, done=lambda history: problems.done(task, size, history),
    )  # fmt: skip
    return {
      "arm": arm.title,
      **about,
      "parameters": sum(x.size for x in jax.tree.leaves(fitted.params)),
      "history": fitted.history,
      "environment": environment.describe(),
    }

  result, is_new = kept.once(path, make)
  if not is_new:
    return result
  last = result["history"][-1]
  shown = ", ".join(
    f"{k} {v:.3f}" for k, v in last.items() if k.endswith("sequence")
  )
  command.say(
    f"{task}, {arm.title}, rate {rate:g}, seed {seed}: step {last['step']}, "
    f"{shown}, {result['seconds']:.0f} s"
  )
  return result


def _slug(text: str) -> str:
  return "".join(c if c.isalnum() else "_" for c in text)


def _digest(about: dict[str, Any]) -> str:
  text = json.dumps(about, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]
