"""Reads a long text with a trained model, which learns while it reads.

    python -m experiments.read --workdir=runs/hope_tiny --text=book.txt \\
        --memory_out=book.memory

Memory and time a token stay the same however long the text is. Ctrl-C keeps
what was read; --memory_in=book.memory resumes there. A picture beside
--memory_out, book.memory.png, shows the surprise over the text, beside that of
a memory that begins again every --forget_every tokens, and within the chunks
of each memory: how much less a token surprises after a write than before it.

--prompts=texts.jsonl --memories=folder reads many texts at once, each into the
memory of its own name (lines {"name": ..., "text": ...}); where that is there,
it resumes.

--point=before_book marks what is remembered before the text is read;
--roll_back=before_book goes back to it, from a memory that has it.
--drift_bound is the norm of the change of all fast weights, since the point
--since or the beginning of this reading, beyond which the memory writes no
more.
"""

import pathlib

from absl import flags, logging

from experiments.cli import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
_TEXT = flags.DEFINE_string("text", "", "The UTF-8 file to read.")
_IN = flags.DEFINE_string("memory_in", "", "A memory file to resume from.")
_OUT = flags.DEFINE_string("memory_out", "", "Keep the memory in this file.")
_OVERWRITE = flags.DEFINE_boolean(
  "overwrite", False, "Replace --memory_out and its picture, if they are there."
)
_PROMPTS = flags.DEFINE_string("prompts", "", "Read the texts of this JSONL.")
_MEMORIES = flags.DEFINE_string("memories", "", "Folder of their memories.")
_POINT = flags.DEFINE_string(
  "point", "", "Name of a point to mark before the text is read."
)
_BACK = flags.DEFINE_string(
  "roll_back", "", "Name of a point of --memory_in to begin from."
)
_BOUND = flags.DEFINE_float(
  "drift_bound", None,
  "Norm of the change of the memory beyond which it stops writing.",
)  # fmt: skip
_SINCE = flags.DEFINE_string(
  "since", "", "The point that drift is measured from; default: the beginning."
)
_FORGET = flags.DEFINE_integer(
  "forget_every", None,
  "Tokens after which a memory to compare with begins again; 0: none is read; "
  "default: the trained length.", lower_bound=0,
)  # fmt: skip

# The point at the beginning of a reading that has no name for it.
_BEGUN = "beginning"


def main() -> int:
  """Runs the command; returns its exit status."""
  for flag, other in ((_BACK, _IN), (_SINCE, _BOUND)):
    if flag.value and not other.present:
      raise ValueError(f"--{flag.name} needs --{other.name}")
  if _BEGUN in (_POINT.value, _SINCE.value):
    raise ValueError(f"the name {_BEGUN!r} of a point is taken: give another")
  if _PROMPTS.value:
    return _read_many()
  for flag in (_WORKDIR, _TEXT, _OUT):
    if not flag.value:
      raise ValueError(f"--{flag.name} is required")
  if not pathlib.Path(_WORKDIR.value).is_dir():
    raise ValueError(f"no folder {_WORKDIR.value}: give the --workdir of a run")
  text = pathlib.Path(_TEXT.value)
  if not text.is_file():
    raise FileNotFoundError(f"no file --text={_TEXT.value}")
  logging.set_verbosity(logging.WARNING)
  picture = pathlib.Path(f"{_OUT.value}.png")
  command.say(f"loading the model of {_WORKDIR.value} ...")
  from experiments.read import reading
  from nl_jax import build, drift, files, stream
  from nl_jax.train import checkpoint, stop

  # Going on from a file and keeping the memory there asks for no flag.
  if not (_OVERWRITE.value or _IN.value == _OUT.value):
    files.refuse_taken("--memory_out", _OUT.value, picture)
  config, net = build.of_run(_WORKDIR.value)
  if net.grows:
    raise ValueError(
      f"model.arch={config.model.arch!r} keeps every token that it reads: no "
      "text of any length fits; read with a model of memories, such as hope"
    )
  tokenizer = build.tokenizer(config)
  params, step = checkpoint.load_params(_WORKDIR.value, net)
  command.say(f"{config.model.arch} at step {step} of {_WORKDIR.value}")
  if _IN.value:
    reader, manifest = stream.go_on(net, params, _IN.value)
  else:
    reader, manifest = stream.start(net, params), {"about": {}}
  if _BACK.value:
    manifest = {"about": reader.roll_back(_BACK.value).about}
  begun = _POINT.value or _BEGUN
  reader.mark(begun, manifest["about"])
  if _BOUND.value is not None:
    reader.bound(_BOUND.value, _SINCE.value or begun)
  # All that can go wrong at the end goes wrong now.
  stream.check_place(_OUT.value, "--memory_out", net, reader.state)
  files.check_place(picture, "--memory_out (its picture)")
  reading.check_text(text)
  start = reading.place(text, manifest["about"].get("text"))
  if _IN.value:
    command.say(
      f"going on at byte {start:,}" if start
      else "the memory is of another text: reading this one from its beginning"
    )  # fmt: skip
  every = net.sequence_length if _FORGET.value is None else _FORGET.value
  without = reading.Forgetful(net, params, every) if every else None
  with stop.listen() as asked:
    done = reading.read(reader, tokenizer, text, start, net, asked, without)
  kept = {k: x for k, x in reader.points.items() if k != _BEGUN}
  stream.save_memory(
    _OUT.value, net, params, reader.state, logits=reader.logits, points=kept,
    about={"text": done.place},
  )  # fmt: skip
  print(done.summary())
  if drift.has_memory(reader.state):
    moved = reader.drift(begun)[0]
    print(f"drift:   {moved:.4g} (norm of the change of all fast weights)")
  print(f"memory:  {_OUT.value}")
  if done.tokens:
    reading.draw(done, picture)
    print(f"picture: {picture}")
  if asked.reason:
    command.say("stopped; --memory_in resumes there")
    return command.INTERRUPTED
  return command.DONE


def _read_many() -> int:
  """Reads many texts, each into its own memory; returns the exit status."""
  others = (_TEXT, _IN, _OUT, _POINT, _BACK, _BOUND, _SINCE)
  if given := [flag.name for flag in others if flag.present]:
    raise ValueError(f"--{given[0]} is for one text, and --prompts for many")
  for flag in (_WORKDIR, _MEMORIES):
    if not flag.value:
      raise ValueError(f"--{flag.name} is required")
  logging.set_verbosity(logging.WARNING)
  from experiments.cli import many
  from nl_jax import build
  from nl_jax.data import tokenizers
  from nl_jax.train import checkpoint

  prompts = many.load(_PROMPTS.value, _MEMORIES.value)
  config, net = build.of_run(_WORKDIR.value)
  tokenizer = tokenizers.load(config.data.tokenizer)
  params, step = checkpoint.load_params(_WORKDIR.value, net)
  command.say(f"{config.model.arch} at step {step} of {_WORKDIR.value}")
  many.check(prompts, net, params)
  for number, done in enumerate(many.read(prompts, net, params, tokenizer), 1):
    size = len(done.prompt.text.encode())
    print(
      f"{done.prompt.memory}: {size:,} bytes, {done.tokens:,} tokens, "
      f"{done.nats / size:.4f} nat per byte",
      flush=True,
    )
    if number % many.AT_ONCE == 0:
      command.say(f"{number:,} of {len(prompts):,} texts are read")
  return command.DONE


if __name__ == "__main__":
  command.run(main)
