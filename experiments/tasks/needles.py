"""Asks a trained model for needles, as RULER does, and keeps what it said.

Questions are read in batches: each row is padded after its last token, which
changes nothing, and a stream resumes from there, greedily.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import command, generation, named
from experiments.tasks import arms, problems, training, trials
from nl_jax import build, stream
from nl_jax.data import documents, sources
from nl_jax.tasks import batches, needles
from nl_jax.train import checkpoint

_PIECE = 256  # Tokens of a row that are read at once.
_DEFAULT_DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)


@dataclasses.dataclass(frozen=True)
class Asked:
  """What is asked for.

  Attributes:
    task: a key of `needles.TASKS`.
    lengths: tokens of prompt and answer, at most.
    depths: percent of the haystack before the needle; None: drawn for each
      question; (): five, or drawn where a task has several answers.
    samples: questions of a length and depth.
    new_tokens: of an answer, at most.
    seed: of all.
  """

  task: str
  lengths: tuple[int, ...]
  depths: tuple[float, ...] | None
  samples: int
  new_tokens: int
  seed: int

  def cells(self) -> list[tuple[int, float | None]]:
    """(length, depth) of each cell; depth None is drawn."""
    several = needles.TASKS[self.task].answers > 1
    depths = self.depths
    if depths == ():
      depths = None if several else _DEFAULT_DEPTHS
    return [(t, d) for t in self.lengths for d in depths or (None,)]


class Subject(NamedTuple):
  """Who is asked.

  Attributes:
    net, params: the model.
    tokenizer: its.
    about: JSON values that tell of it.
  """

  net: Any
  params: Any
  tokenizer: Any
  about: dict[str, Any]


class Haystack(NamedTuple):
  """The text that needles are hidden in.

  Attributes:
    text: "" for tasks without.
    about: where it is from, and its hash.
  """

  text: str
  about: dict[str, str]


class Answer(NamedTuple):
  """What a model made of a question.

  Attributes:
    output: the text that it wrote.
    match: share of the answers in it.
    forced: whether, told the answer token by token, it would have said each.
    nats: of the answer's tokens, their mean.
  """

  output: str
  match: float
  forced: bool
  nats: float


def load(workdir: pathlib.Path) -> Subject:
  """The newest checkpoint of a run."""
  config, net = build.of_run(str(workdir))
  tokenizer = build.tokenizer(config)
  params, step = checkpoint.load_params(str(workdir), net)
  command.say(f"{config.model.arch} at step {step} of {workdir}")
  about = {
    "workdir": str(workdir),
    "arch": config.model.arch,
    "step": step,
    "trained_length": config.data.sequence_length,
    "tokenizer": tokenizer.fingerprint,
    "weights": stream.weights_hash(params),
  }
  return Subject(net, params, tokenizer, about)


def learned(
  arm: arms.Arm, asked: Asked, text: Haystack, size: problems.Sizes
) -> Subject:
  """A model trained from scratch on other questions, of the first length.

  The loss is that of the answers' tokens alone. Questions differ from those
  that are asked by their seed; depths are drawn.

  Args:
    arm: which model.
    asked: what it will be asked.
    text: hidden in.
    size: of the training; its first rate is taken.
  """
  config = named.load_config(arm.config)
  tokenizer = build.tokenizer(config)
  length, vocab_size = asked.lengths[0], config.model.vocab_size
  train, test = (
    _rows(tokenizer, dataclasses.replace(asked, seed=seed), text, count)
    for seed, count in ((asked.seed + 1, size.train), (asked.seed, size.test))
  )
  net = arms.model(
    arm, vocab_size, max(asked.lengths), size.batch_size * length
  )
  rate, *_ = size.learning_rates
  fitted = training.fit(
    net, train, {"questions": test}, problems.plan(asked.task, size, rate),
    seed=0, done=lambda history: _told(asked.task, history),
  )  # fmt: skip
  about = {
    "workdir": "",
    "arch": net.arch,
    "model": arms.described(net),
    "learned": asked.task,
    "training": trials.protocol(asked.task, size) | {"learning_rate": rate},
    "step": fitted.history[-1]["step"],
    "trained_length": length,
    "tokenizer": tokenizer.fingerprint,
    "weights": stream.weights_hash(fitted.params),
  }
  return Subject(net, fitted.params, tokenizer, about)


def _told(task: str, history: list[dict[str, float]]) -> bool:
  last = history[-1]
  command.say(
    f"{task}, step {last['step']}: loss {last['loss']:.3f}, answers right "
    f"{100 * last['questions/sequence']:.1f} %"
  )
  return last["questions/position"] > problems.SOLVED


def _rows(
  tokenizer: Any, asked: Asked, text: Haystack, count: int
) -> batches.Batch:
  """Questions with their answers; the next token is asked for in these."""
  made = _needles(tokenizer, asked, text, asked.lengths[0])
  rows, labels = [], []
  for i in range(count):
    question = made.sample(i)
    prompt = generation.encode(tokenizer, question.prompt)
    gold = needles.continuation(question.answers)
    whole = generation.encode(tokenizer, question.prompt + gold)
    silent = [batches.NO_LABEL] * (len(prompt) - 1)
    rows.append(whole[:-1])
    labels.append([*silent, *whole[len(prompt) :]])
  longest = max(asked.lengths[0], max(map(len, rows)))
  return batches.labelled(rows, labels, longest)


def _needles(
  tokenizer: Any, asked: Asked, text: Haystack, length: int
) -> needles.Needles:
  return needles.Needles(
    asked.task, length, lambda x: len(tokenizer.encode(x)), text=text.text,
    seed=asked.seed, new_tokens=asked.new_tokens,
  )  # fmt: skip


def haystack(task: str, path: str) -> Haystack:
  """The text of a file, or of the embedded corpus; none for other haystacks.

  Raises:
    FileNotFoundError: no file there.
    ValueError: a file that no text is read from, or not UTF-8.
  """
  if needles.TASKS[task].haystack != needles.ESSAYS:
    if path:
      raise ValueError(
        f"--haystack is not read by {task}, whose haystack is "
        f"{needles.TASKS[task].haystack}"
      )
    return Haystack("", {"text": needles.TASKS[task].haystack})
  if path:
    file = pathlib.Path(path)
    if not file.is_file():
      raise FileNotFoundError(f"no file --haystack={path}")
    text, name = documents.decode(file.read_bytes(), file), file.name
  else:
    source = sources.embedded()
    text = "\n".join(source.documents("validation"))
    name = f"embedded, validation: {source.origin}"
  sha256 = hashlib.sha256(text.encode()).hexdigest()
  return Haystack(text, {"text": name, "sha256": sha256})


def run(
  subject: Subject, asked: Asked, text: Haystack, folder: pathlib.Path,
  at_once: int,
) -> tuple[dict[str, Any], pathlib.Path]:  # fmt: skip
  """Asks all questions that the folder has no answers of; writes the file.

  Args:
    subject: who.
    asked: what.
    text: hidden in.
    folder: of results.
    at_once: questions of a batch.

  Returns:
    {"task", "about", "cells"} and the file that it is in.
  """
  about = {
    "version": trials.VERSION,
    "model": subject.about,
    "haystack": text.about,
    "samples": asked.samples,
    "new_tokens": asked.new_tokens,
    "seed": asked.seed,
    "words": "built in",  # Not RULER's lists: no figure is comparable.
  }
  digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
  path = folder / f"{asked.task}-{digest.hexdigest()[:12]}.json"
  known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  result = {"task": asked.task, "about": about, "cells": []} | known
  there = {(cell["length"], cell["depth"]): cell for cell in result["cells"]}
  # Questions first: a length that is too short is found before any compile.
  questions = {
    cell: _questions(subject, asked, text, *cell)
    for cell in asked.cells()
    if cell not in there
  }
  for (length, depth), some in questions.items():
    cell = _ask(subject, asked, some, length, at_once)
    result["cells"].append({"length": length, "depth": depth, **cell})
    trials.save(path, result)
    command.say(
      f"{asked.task}, {length} tokens, depth "
      f"{'drawn' if depth is None else f'{depth:g} %'}: "
      f"{100 * cell['match']:.1f} % found, {cell['nats']:.3f} nat per token"
    )
  shown = [there.get(cell) or _cell(result, cell) for cell in asked.cells()]
  return {**result, "cells": shown}, path


def _cell(result: dict[str, Any], cell: tuple[int, float | None]) -> dict:
  return next(c for c in result["cells"] if (c["length"], c["depth"]) == cell)


def _questions(
  subject: Subject, asked: Asked, text: Haystack, length: int,
  depth: float | None,
) -> list[needles.Sample]:  # fmt: skip
  made = _needles(subject.tokenizer, asked, text, length)
  return [made.sample(i, depth) for i in range(asked.samples)]


def _ask(
  subject: Subject, asked: Asked, questions: Sequence[needles.Sample],
  length: int, at_once: int,
) -> dict[str, Any]:  # fmt: skip
  """The figures of a cell."""
  answers = []
  for i in range(0, len(questions), at_once):
    answers += answer(
      subject, questions[i : i + at_once], length, asked.new_tokens
    )
  mean = lambda field: statistics.fmean(getattr(a, field) for a in answers)
  return {
    "match": mean("match"),
    "match_standard_error": batches.standard_error(mean("match"), len(answers)),
    "forced": mean("forced"),
    "nats": mean("nats"),
    "prompt_tokens": max(
      len(subject.tokenizer.encode(q.prompt)) for q in questions
    ),
    "outputs": [a.output for a in answers[:3]],
  }


def answer(
  subject: Subject,
  questions: Sequence[needles.Sample],
  length: int,
  new_tokens: int,
) -> list[Answer]:
  """Lets the model answer questions; it is given no gold answer to see.

  Args:
    subject: who.
    questions: B of them.
    length: tokens of a prompt and of an answer, at most.
    new_tokens: of an answer, at most.
  """
  net, params, tokenizer, _ = subject
  prompts = [generation.encode(tokenizer, q.prompt) for q in questions]
  golds = [
    _gold(tokenizer, q.prompt, needles.continuation(q.answers), len(prompt))
    for q, prompt in zip(questions, prompts)
  ]
  # A gold answer may be longer than what is kept free for the model's own.
  slots = max(length, max(len(p) + len(g) for p, g in zip(prompts, golds)))
  reader = stream.start(net, params, len(prompts), slots)
  reader = _prefilled(reader, prompts)
  told = dataclasses.replace(reader, state=stream.clone(reader.state))
  forced, nats = _forced(told, golds, tokenizer.vocab_size)
  drawn = reader.sample(
    new_tokens, vocab_size=tokenizer.vocab_size, temperature=0.0,
    stop_id=tokenizer.end_id,
  )  # fmt: skip
  outputs = [
    tokenizer.decode(_until(row, tokenizer.end_id))
    for row in np.stack(list(drawn), axis=1)
  ]
  return [
    Answer(output, needles.string_match(output, q.answers), bool(f), float(n))
    for output, q, f, n in zip(outputs, questions, forced, nats)
  ]


def _gold(
  tokenizer: Any, prompt: str, gold: str, prompt_tokens: int
) -> np.ndarray:
  """The tokens that a right answer adds to those of the prompt."""
  return generation.encode(tokenizer, prompt + gold)[prompt_tokens:]


def _until(row: np.ndarray, end_id: int) -> np.ndarray:
  ends = np.flatnonzero(row == end_id)
  return row[: ends[0]] if len(ends) else row


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _read(
  net: Any, params: Any, rows: dict[str, jax.Array], state: Any,
  before: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:  # fmt: skip
  """Logits at each token, after the last real one of each row; the state."""
  logits, state, _ = net.apply(
    params, rows["ids"], state, segment_ids=rows["segment_ids"]
  )
  count = jnp.sum(rows["segment_ids"], axis=1)
  at = jnp.maximum(count - 1, 0)[:, None, None]
  last = jnp.take_along_axis(logits, at, axis=1)[:, 0]
  return logits, jnp.where(count[:, None] > 0, last, before), state


def _padded(rows: Sequence[np.ndarray], multiple: int) -> dict[str, np.ndarray]:
  longest = max(map(len, rows))
  shape = (len(rows), longest + -longest % multiple)
  ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  for i, row in enumerate(rows):
    ids[i, : len(row)], segments[i, : len(row)] = row, 1
  return {"ids": ids, "segment_ids": segments}


def _prefilled(
  reader: stream.Stream, prompts: Sequence[np.ndarray]
) -> stream.Stream:
  """A stream of rows that have each read a prompt of its own length."""
  padded, state = _padded(prompts, _PIECE), reader.state
  last = jnp.zeros((len(prompts), reader.model.vocab_size), jnp.float32)
  for i in range(0, padded["ids"].shape[1], _PIECE):
    piece = {k: x[:, i : i + _PIECE] for k, x in padded.items()}
    _, last, state = _read(reader.model, reader.params, piece, state, last)
  return dataclasses.replace(
    reader, state=state, logits=last, _seen=max(map(len, prompts))
  )


def _forced(
  reader: stream.Stream, golds: Sequence[np.ndarray], vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Whether each token of an answer is the likeliest, and mean nats, [B]."""
  padded = _padded(golds, _PIECE // 8)
  logits, _, _ = _read(
    reader.model, reader.params, padded, reader.state, reader.logits
  )
  ahead = np.concatenate([reader.logits[:, None], logits[:, :-1]], axis=1)
  real = padded["segment_ids"] > 0
  right = ahead[..., :vocab_size].argmax(-1) == padded["ids"]
  chosen = np.take_along_axis(ahead, padded["ids"][..., None], -1)[..., 0]
  nats = np.asarray(jax.nn.logsumexp(ahead, axis=-1)) - chosen
  mean = np.sum(nats * real, axis=1) / real.sum(axis=1)
  return np.all(right | ~real, axis=1), mean
