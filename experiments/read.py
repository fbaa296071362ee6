"""Reads a long text with a trained model, which learns while it reads.

    python -m experiments.read --workdir=runs/hope_tiny --text=book.txt \\
        --memory_out=book.memory

Memory and time a token stay the same however long the text is. Ctrl-C keeps
what was read; --memory_in=book.memory goes on there. A picture beside
--memory_out shows the surprise over the text, and within the chunks of each
memory: how much less a token surprises after a write than before it.
"""

import pathlib

from absl import flags, logging

from experiments import _main

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
_TEXT = flags.DEFINE_string("text", "", "The UTF-8 file to read.")
_IN = flags.DEFINE_string("memory_in", "", "A memory file to go on from.")
_OUT = flags.DEFINE_string("memory_out", "", "Keep the memory in this file.")


def main() -> int:
  """Runs the command; returns its exit status."""
  for flag in (_WORKDIR, _TEXT, _OUT):
    if not flag.value:
      raise ValueError(f"--{flag.name} is required")
  if not pathlib.Path(_WORKDIR.value).is_dir():
    raise ValueError(f"no folder {_WORKDIR.value}: give the --workdir of a run")
  text = pathlib.Path(_TEXT.value)
  if not text.is_file():
    raise FileNotFoundError(f"no file --text={_TEXT.value}")
  logging.set_verbosity(logging.WARNING)
  _main.say(f"loading the model of {_WORKDIR.value} ...")
  from experiments import _reading, _setup
  from nl_jax import stream
  from nl_jax.train import checkpoint, stop

  config, net = _setup.of_run(_WORKDIR.value)
  if net.grows:
    raise ValueError(
      f"model.arch={config.model.arch!r} keeps every token that it reads: no "
      "text of any length fits; read with a model of memories, such as hope"
    )
  tokenizer = _setup.tokenizer(config)
  params, step = checkpoint.load_params(_WORKDIR.value, net)
  _main.say(f"{config.model.arch} at step {step} of {_WORKDIR.value}")
  if _IN.value:
    reader, manifest = stream.go_on(net, params, _IN.value)
  else:
    reader, manifest = stream.start(net, params), {"about": {}}
  start = _reading.place(text, manifest["about"].get("text"))
  if _IN.value:
    _main.say(
      f"going on at byte {start:,}" if start
      else "the memory is of another text: reading this one from its beginning"
    )  # fmt: skip
  with stop.listen() as asked:
    done = _reading.read(reader, tokenizer, text, start, net, asked)
  stream.save_memory(
    _OUT.value, net, params, reader.state, logits=reader.logits,
    about={"text": done.place},
  )  # fmt: skip
  picture = pathlib.Path(_OUT.value).with_suffix(".png")
  print(done.summary())
  print(f"memory:  {_OUT.value}")
  if done.tokens:
    _reading.draw(done, picture)
    print(f"picture: {picture}")
  if asked.reason:
    _main.say("stopped; --memory_in goes on there")
    return _main.INTERRUPTED
  return _main.DONE


if __name__ == "__main__":
  _main.run(main)
