"""Commands in any order, on the same few folders, with rude acts between.

A command ends with status 0, or with status 1 and one sentence; one that is
refused changes no file of any run.
"""

import functools
import hashlib
import os
import pathlib
import random
import runpy
import shutil
import sys

from absl import flags

from experiments.fuzz import run as run_lib

Case = run_lib.Case
Wrong = run_lib.Wrong

_RUNS = ("runs/a", "runs/b", "runs/c")
_TEXT = "book.txt"
_MEMORIES = ("one.memory", "two.memory")
_SIZE = ("--config.eval.batches=1", "--config.checkpoint.every=1")
# Between commands; their case only says that they were done.
_ACTS = ("copy", "lose checkpoints", "tear", "lose", "file in the way")
_LM = (
  (), (), ("--config.train.steps=3",), ("--config.train.steps=1",),
  ("--config.data.batch_size=1",), ("--config.train.seed=7",),
  ("--config.model.mixer.bias=True",), ("--allow_config_change",),
  ("--config.data.batch_size=4", "--allow_config_change"),
  ("--config.optim.name=muon", "--allow_config_change"),
  ("--config.data.path=book.txt",), ("--config.data.path=shards",),
  ("--resume_from={other}",), ("--init_from={other}",),
)  # fmt: skip


def cases(count: int, folder: pathlib.Path, draw: random.Random) -> list[Case]:
  """Commands and acts, in the order in which they are to be run.

  Args:
    count: how many.
    folder: of all of them.
    draw: what decides them.
  """
  folder.mkdir()
  (folder / _TEXT).write_text("It was the best of times. " * 400)
  made = []
  for number in range(count):
    if number and draw.random() < 0.2:
      act, seed = draw.choice(_ACTS), draw.randrange(2**32)
      run = functools.partial(_act, folder, act, seed)
      made.append(Case("act", f"{act} (seed {seed})", run))
      continue
    command = _drawn(draw) if number else _lm("runs/a", draw, ())
    run = functools.partial(_run, folder, command)
    made.append(Case("command", " ".join(command), run))
  return made


def _lm(run: str, draw: random.Random, more: tuple[str, ...]) -> list[str]:
  other = draw.choice(_RUNS)
  return [
    "lm", "--config=transformer_tiny:smoke", f"--workdir={run}", *_SIZE,
    "--config.train.steps=2", *(x.format(other=other) for x in more),
  ]  # fmt: skip


def _drawn(draw: random.Random) -> list[str]:
  run, other = draw.choice(_RUNS), draw.choice(_RUNS)
  memory = draw.choice(_MEMORIES)
  if draw.random() < 0.45:
    return _lm(run, draw, draw.choice(_LM))
  return draw.choice((
    ["sample", f"--workdir={run}", "--tokens=3", "--prompt=It"],
    ["sample", f"--workdir={run}", "--tokens=3", f"--memory_in={memory}"],
    ["read", f"--workdir={run}", f"--text={_TEXT}", f"--memory_out={memory}"],
    ["report", f"--workdir={run}", f"--compare={other}", "--out=page"],
    ["export", f"--workdir={run}", f"--out=export{draw.randrange(2)}"],
    ["prepare", f"--path={_TEXT}", "--out=shards", "--tokenizer=bytes",
     "--sequence_length=64", "--workers=1"],
    ["prepare", f"--path={run}", "--out=shards", "--tokenizer=bytes"],
    ["raster", f"--workdir={run}", f"--text={_TEXT}"],
  ))  # fmt: skip


def _forget_flags() -> None:
  """Takes away the flags of the fuzz: a command has some of these names."""
  for module, own in flags.FLAGS.flags_by_module_dict().items():
    if pathlib.Path(module).stem == "fuzz":
      for flag in own:
        delattr(flags.FLAGS, flag.name)


def _run(folder: pathlib.Path, command: list[str]) -> str:
  _forget_flags()
  os.chdir(folder)
  before = _of_runs(folder)
  sys.argv = command
  code = None
  try:
    runpy.run_module(f"experiments.{command[0]}", run_name="__main__")
  except SystemExit as error:
    code = error.code
  if code:
    changed = {
      name for name, x in _of_runs(folder).items() if before.get(name) != x
    }
    if changed or before.keys() - _of_runs(folder).keys():
      raise Wrong(f"refused, and changed {', '.join(sorted(changed))}")
    raise SystemExit(code)
  return "done"


def _of_runs(folder: pathlib.Path) -> dict[str, str]:
  """Hashes of what runs have, by name; locks and caches left out."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in (folder / "runs").rglob("*")
    if path.is_file()
    and path.name != ".lock"
    and "compilation_cache" not in path.parts
  }


def _act(folder: pathlib.Path, act: str, seed: int) -> str:
  draw = random.Random(seed)
  runs = [x for x in sorted(folder.glob("runs/*")) if x.is_dir()]
  if not runs:
    return "there is no run"
  run = draw.choice(runs)
  files = sorted(
    x
    for x in run.rglob("*")
    if x.is_file() and "compilation_cache" not in x.parts
  )
  if act == "copy":
    target = folder / draw.choice(_RUNS)
    if not target.exists():
      shutil.copytree(run, target)
    return f"{run.name} copied to {target.name}"
  if act == "lose checkpoints":
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return f"the checkpoints of {run.name}"
  if act == "file in the way":
    target = folder / draw.choice((*_MEMORIES, "shards", "page", "export0"))
    if not target.exists():
      target.write_text("not yours")
    return target.name
  path = draw.choice(files)
  if act == "lose":
    path.unlink()
  else:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)])
  return str(path.relative_to(folder))
