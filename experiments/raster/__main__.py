"""Draws which level changed when while a trained model reads a text.

    python -m experiments.raster --workdir=runs/hope_tiny --text=book.txt

A lane a level, with a mark at each chunk in which its fast weights moved; below
it their norms and the surprise, on the same tokens. Levels that change in
training only have empty lanes.
"""

import pathlib

from absl import flags, logging

from experiments.cli import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
_TEXT = flags.DEFINE_string("text", "", "The UTF-8 file to read.")
_TOKENS = flags.DEFINE_integer(
  "tokens", 512, "Tokens to read, at most.", lower_bound=16
)
_OUT = flags.DEFINE_string("out", "", "The picture; default <run>/raster.png.")


def main() -> int:
  """Runs the command; returns its exit status."""
  for flag in (_WORKDIR, _TEXT):
    if not flag.value:
      raise ValueError(f"--{flag.name} is required")
  workdir, text = pathlib.Path(_WORKDIR.value), pathlib.Path(_TEXT.value)
  if not workdir.is_dir():
    raise ValueError(f"no folder {workdir}: give the --workdir of a run")
  if not text.is_file():
    raise FileNotFoundError(f"no file --text={text}")
  logging.set_verbosity(logging.WARNING)
  from experiments.cli import generation
  from experiments.raster import recording
  from nl_jax import build
  from nl_jax.data import documents
  from nl_jax.train import checkpoint

  config, net = build.of_run(str(workdir))
  if not recording.chunks(net):
    raise ValueError(
      f"model.arch={config.model.arch!r} has no memory that changes while it "
      "reads; draw a model of memories, such as hope"
    )
  tokenizer = build.tokenizer(config)
  # Enough bytes for the tokens, cut after a character.
  with text.open("rb") as file:
    content = file.read(32 * _TOKENS.value)
  content = content.decode("utf-8", "ignore").encode("utf-8")
  read = documents.decode(content, text)
  ids = generation.encode(tokenizer, read, is_first=True)[: _TOKENS.value]
  params, step = checkpoint.load_params(str(workdir), net)
  command.say(f"{config.model.arch} at step {step} of {workdir}")
  trace = recording.trace(net, params, ids)
  out = pathlib.Path(_OUT.value or workdir / "raster.png")
  recording.draw(trace, net, out)
  for name, level in trace.levels.items():
    moved = sum(norm > 0 for norm in level["update_norm"])
    print(f"{name}: changed in {moved} of {len(trace.ends)} chunks")
  print(f"picture: {out}")
  return command.DONE


if __name__ == "__main__":
  command.run(main)
