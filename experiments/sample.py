"""Writes text with a trained model, token by token as it comes.

    python -m experiments.sample --workdir=runs/hope_tiny --prompt="def "

With --memory_out the model's memory of prompt and text is kept in a file, and
with --memory_in it resumes from there, in another process or on another day.

--prompts=texts.jsonl --memories=folder writes on from many texts at once, each
with the memory of its name where there is one (lines {"name": ..., "text":
...}), and prints lines of the same form.
"""

import json
import pathlib
import sys

from absl import flags, logging

from experiments.cli import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; may be empty.")
_TOKENS = flags.DEFINE_integer("tokens", 200, "Tokens to write.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.9, "0: always the most likely token.", lower_bound=0.0
)
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Mass of the most likely tokens to draw from, in (0, 1]."
)
_FILE = flags.DEFINE_string(
  "prompt_file", "", "A UTF-8 file to read before the prompt."
)
_IN = flags.DEFINE_string("memory_in", "", "A memory file to resume from.")
_OUT = flags.DEFINE_string("memory_out", "", "Keep the memory in this file.")
_OVERWRITE = flags.DEFINE_boolean(
  "overwrite", False, "Replace --memory_out, if it is there."
)
_PROMPTS = flags.DEFINE_string(
  "prompts", "", "Continue the texts of this JSONL."
)
_MEMORIES = flags.DEFINE_string("memories", "", "Folder of their memories.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.", lower_bound=0)


def main() -> int:
  """Runs the command; returns its exit status."""
  if not _WORKDIR.value:
    raise ValueError("--workdir is required: the folder of a trained run")
  if not pathlib.Path(_WORKDIR.value).is_dir():
    raise ValueError(f"no folder {_WORKDIR.value}: give the --workdir of a run")
  logging.set_verbosity(logging.WARNING)  # Only the text, and mistakes.
  if _PROMPTS.value:
    return _sample_many()
  import jax

  from experiments.cli import generation
  from nl_jax import build, files, stream
  from nl_jax.data import documents
  from nl_jax.train import checkpoint

  if _OUT.value and not (_OVERWRITE.value or _IN.value == _OUT.value):
    files.refuse_taken("--memory_out", _OUT.value)
  config, net = build.of_run(_WORKDIR.value)
  tokenizer = build.tokenizer(config)
  params, step = checkpoint.load_params(_WORKDIR.value, net)
  command.say(f"{config.model.arch} at step {step} of {_WORKDIR.value}")
  prompt = _PROMPT.value
  if _FILE.value:
    path = pathlib.Path(_FILE.value)
    prompt = documents.decode(path.read_bytes(), path) + prompt
  if _IN.value:
    reader, manifest = stream.go_on(net, params, _IN.value)
    command.say(f"a memory of {max(manifest['tokens_seen']):,} tokens")
  else:
    # Beyond the trained length where that is asked for: an attention cache
    # takes any number of slots, other states need none.
    size = generation.encode(tokenizer, prompt).size + 1
    mesh = stream.mesh_of(net, params, jax.local_devices())
    reader = stream.start(net, params, length=size + _TOKENS.value, mesh=mesh)
  if _OUT.value:
    stream.check_place(_OUT.value, "--memory_out", net, reader.state)
  sys.stdout.write(_PROMPT.value)
  for piece in generation.generate(
    reader,
    tokenizer,
    prompt,
    _TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_p=_TOP_P.value,
    seed=_SEED.value,
  ):
    sys.stdout.write(piece)
    sys.stdout.flush()
  sys.stdout.write("\n")
  if _OUT.value:
    stream.save_memory(
      _OUT.value, net, params, reader.state, logits=reader.logits
    )
    command.say(f"memory: {_OUT.value}")
  return command.DONE


def _sample_many() -> int:
  """Writes on from many texts; returns the exit status."""
  others = (_PROMPT, _FILE, _IN, _OUT)
  if given := [flag.name for flag in others if flag.present]:
    raise ValueError(f"--{given[0]} is for one text, and --prompts for many")
  if not _MEMORIES.value:
    raise ValueError("--memories is required: the folder of their memories")
  from experiments.cli import many
  from nl_jax import build
  from nl_jax.data import tokenizers
  from nl_jax.train import checkpoint

  prompts = many.load(_PROMPTS.value, _MEMORIES.value)
  config, net = build.of_run(_WORKDIR.value)
  tokenizer = tokenizers.load(config.data.tokenizer)
  params, step = checkpoint.load_params(_WORKDIR.value, net)
  command.say(f"{config.model.arch} at step {step} of {_WORKDIR.value}")
  for prompt, text in many.sample(
    prompts, net, params, tokenizer, _TOKENS.value,
    temperature=_TEMPERATURE.value, top_p=_TOP_P.value, seed=_SEED.value,
  ):  # fmt: skip
    print(json.dumps({"name": prompt.name, "text": text}), flush=True)
  return command.DONE


if __name__ == "__main__":
  command.run(main)
