"""Many texts at once, each with a memory file of its own.

A line of the file --prompts is {"name": …, "text": …}; the memory of a name is
<memories>/<name>.memory, where there is one already.
"""

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.cli import generation
from nl_jax import rows, stream

AT_ONCE = 64  # Texts.
_NAME = re.compile(r"[\w+-][\w.+-]{0,199}")


class Prompt(NamedTuple):
  """A text, and the memory that it is for.

  Attributes:
    name: of the memory.
    text: to read.
    memory: the file.
  """

  name: str
  text: str
  memory: pathlib.Path


class Read(NamedTuple):
  """What reading one text gave.

  Attributes:
    prompt: which.
    tokens: read.
    nats: of the tokens that were predicted.
  """

  prompt: Prompt
  tokens: int
  nats: float


def load(path: str, memories: str) -> list[Prompt]:
  """The texts of a file, in its order.

  Args:
    path: of the JSON lines.
    memories: folder of the memory files.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a line that is not a text with a name, or a name twice.
  """
  source = pathlib.Path(path)
  if not source.is_file():
    raise FileNotFoundError(f"no file --prompts={path}")
  found: dict[str, Prompt] = {}
  with source.open("rb") as file:
    for number, line in enumerate(file, 1):
      name, text = _fields(line, f"{path}:{number}")
      if name in found:
        raise ValueError(
          f"{path}:{number}: the name {name!r} already exists; each text "
          "needs its own"
        )
      place = pathlib.Path(memories) / f"{name}.memory"
      found[name] = Prompt(name, text, place)
  if not found:
    raise ValueError(f"{path} has no line")
  return list(found.values())


def _fields(line: bytes, place: str) -> tuple[str, str]:
  """Name and text of a line."""
  try:
    said = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{place} is not JSON: {error}") from error
  said = said if isinstance(said, dict) else {}
  name, text = said.get("name"), said.get("text")
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise ValueError(
      f'{place}: "name" must be letters, digits and ._+-, at most 200, got '
      f"{name!r:.60}"
    )
  if not isinstance(text, str) or not text:
    raise ValueError(f'{place}: "text" must be a text, got {text!r:.60}')
  return name, text


def groups(
  prompts: list[Prompt], net: Any, params: Any
) -> Iterator[tuple[list[Prompt], stream.Stream]]:
  """Texts that are read at once, and the stream of their memories.

  Those of about the same length come together: a row waits for the longest.

  Raises:
    ValueError: a memory of another model, or a model without memories.
  """
  ordered = sorted(prompts, key=lambda p: (len(p.text), p.name))
  for at in range(0, len(ordered), AT_ONCE):
    some = ordered[at : at + AT_ONCE]
    yield some, rows.join([_reader(p, net, params) for p in some])


def _reader(prompt: Prompt, net: Any, params: Any) -> stream.Stream:
  if not prompt.memory.exists():
    return stream.start(net, params)
  reader, manifest = stream.go_on(net, params, prompt.memory)
  if manifest["rows"] != 1:
    raise ValueError(
      f"{prompt.memory} is the memory of {manifest['rows']} rows, and one text "
      "needs one"
    )
  return reader


def check(prompts: list[Prompt], net: Any, params: Any) -> None:
  """Finds before a long work what could not be read or kept.

  Raises:
    ValueError: a memory of another model or weights, or damaged.
    StorageError: the system refuses to write there.
  """
  for prompt in prompts:
    reader = _reader(prompt, net, params)
    prompt.memory.parent.mkdir(parents=True, exist_ok=True)
    stream.check_place(prompt.memory, "--memories", net, reader.state)


def read(
  prompts: list[Prompt], net: Any, params: Any, tokenizer: Any
) -> Iterator[Read]:
  """Reads all texts and keeps what is remembered, group by group."""
  for some, reader in groups(prompts, net, params):
    ids = [generation.encode(tokenizer, prompt.text) for prompt in some]
    for row, nats in enumerate(rows.score(reader, ids)):
      own = rows.part(reader, row)
      stream.save_memory(
        some[row].memory, net, params, own.state, logits=own.logits
      )
      yield Read(some[row], len(nats), float(np.nansum(nats)))


def sample(
  prompts: list[Prompt],
  net: Any,
  params: Any,
  tokenizer: Any,
  tokens: int,
  **how: Any,
) -> Iterator[tuple[Prompt, str]]:
  """What follows each text; the memory files stay as they are.

  Args:
    prompts: of `load`.
    net, params, tokenizer: of the run.
    tokens: at most, of each.
    how: temperature, top_p, seed of `stream.Stream.sample`.
  """
  for some, reader in groups(prompts, net, params):
    rows.score(reader, [generation.encode(tokenizer, p.text) for p in some])
    drawn = np.stack(
      list(
        reader.sample(
          tokens,
          vocab_size=tokenizer.vocab_size,
          stop_id=tokenizer.end_id,
          **how,
        )
      ),
      axis=1,
    )
    for prompt, ids in zip(some, drawn):
      end = np.flatnonzero(ids == tokenizer.end_id)
      pieces = tokenizer.stream()
      text = pieces.push(ids[: end[0]] if len(end) else ids) + pieces.flush()
      yield prompt, text
