"""Needles in a haystack, by the prompts of RULER (Hsieh et al., 2404.06654).

A sentence tells the magic number (or uuid) of a key; it stands somewhere in a
long text; the prompt ends in the middle of a sentence that the number ends.
The haystack is as long as the tokens of the prompt and of the answer allow.
"""

import dataclasses
import functools
import re
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nl_jax.tasks import words

NOISE, ESSAYS, NEEDLES = "noise", "essays", "needles"  # Haystacks.
NEW_TOKENS = 128
DEPTHS = tuple(int(d) for d in np.round(np.linspace(0, 100, 40)))
_LINE = (
  "The grass is green. The sky is blue. The sun is yellow. Here we go. There "
  "and back again."
)
_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_ONE = (
  "A special magic {kind} is hidden within the following text. Make sure to "
  "memorize it. I will quiz you about the {kind} afterwards.\n{context}\nWhat "
  "is the special magic {kind} for {query} mentioned in the provided text? The "
  "special magic {kind} for {query} mentioned in the provided text is"
)
_SEVERAL = (
  "Some special magic {kind}s are hidden within the following text. Make sure "
  "to memorize it. I will quiz you about the {kind}s afterwards.\n{context}\n"
  "What are all the special magic {kind}s for {query} mentioned in the "
  "provided text? The special magic {kind}s for {query} mentioned in the "
  "provided text are"
)
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+")
_CONTROL = re.compile(r"[\x00-\x1f]")
_SHORT = 4096  # Tokens; below, haystacks grow in small steps.
# Units (words, lines) that a haystack grows by: usual, and of short prompts.
# Deviation: short prompts grow by 5 words or a line, because RULER's 500 words
# and 5 lines do not fit into hundreds of bytes.
_STEPS = {NOISE: (25, 1), ESSAYS: (500, 5), NEEDLES: (25, 1)}
_ORDER_SEED = 42  # Of the one order of several needles.


class Task(NamedTuple):
  """A task of RULER.

  Attributes:
    haystack: NOISE, ESSAYS or NEEDLES.
    key: "word" or "uuid".
    value: "number" or "uuid".
    keys: needles with a key of their own.
    values: needles of each key.
    queries: keys asked for.
  """

  haystack: str
  key: str = "word"
  value: str = "number"
  keys: int = 1
  values: int = 1
  queries: int = 1

  @property
  def answers(self) -> int:
    """Values asked for."""
    return self.queries * self.values


TASKS = {
  "niah_single_1": Task(NOISE),
  "niah_single_2": Task(ESSAYS),
  "niah_single_3": Task(ESSAYS, value="uuid"),
  "niah_multikey_1": Task(ESSAYS, keys=4),
  "niah_multikey_2": Task(NEEDLES),
  "niah_multikey_3": Task(NEEDLES, key="uuid", value="uuid"),
  "niah_multivalue": Task(ESSAYS, values=4),
  "niah_multiquery": Task(ESSAYS, keys=4, queries=4),
}


class Sample(NamedTuple):
  """One question.

  Attributes:
    prompt: all that the model reads.
    answers: the values asked for.
    needles: the sentences in the haystack that tell them.
    size: units of the haystack.
  """

  prompt: str
  answers: tuple[str, ...]
  needles: tuple[str, ...]
  size: int


@dataclasses.dataclass(frozen=True)
class Needles:
  """The questions of a task at a length.

  Attributes:
    name: a key of `TASKS`.
    length: tokens of the prompt and of the answer, at most.
    count: text -> its number of tokens, of the model's tokenizer.
    text: of essays; only tasks with essays read it.
    seed: decides all questions.
    new_tokens: kept free for the answer.

  Raises:
    ValueError: an essay without a word.
  """

  name: str
  length: int
  count: Callable[[str], int]
  text: str = ""
  seed: int = 42
  new_tokens: int = NEW_TOKENS

  def __post_init__(self):
    if self.task.haystack == ESSAYS and not self.text.split():
      raise ValueError(f"{self.name} hides needles in a text, and it has none")

  @property
  def task(self) -> Task:
    """The task of the name."""
    return TASKS[self.name]

  @property
  def step(self) -> int:
    """Units that the haystack grows by."""
    usual, short = _STEPS[self.task.haystack]
    return short if self.length < _SHORT else usual

  def sample(self, index: int, depth: float | None = None) -> Sample:
    """Question number `index`.

    Args:
      index: from 0; it has the same keys and values at every length and depth.
      depth: percent of the haystack before the needle, for tasks with one
        answer; None: drawn, as RULER does.

    Raises:
      ValueError: the length has no room for the smallest haystack, or a depth
        out of range or of a task with several answers.
    """
    if depth is not None and self.task.answers > 1:
      raise ValueError(
        f"{self.name} asks for {self.task.answers} values, each at a depth of "
        "its own; give no depth"
      )
    if depth is not None and not 0 <= depth <= 100:
      raise ValueError(f"a depth is of 0 to 100 percent, got {depth}")
    size = self._size
    while not self._fits(made := self._make(index, size, depth)):
      size -= self.step
      if size < self.step:
        raise ValueError(self._too_short(made))
    return made

  @functools.cached_property
  def _size(self) -> int:
    """Units of the largest haystack that fits, by question 0."""
    fits = lambda size: self._fits(self._make(0, size, None))
    low, high = self.step, 2 * self.step
    while fits(high):
      low, high = high, 2 * high
    while high - low > self.step:
      middle = (low + high) // (2 * self.step) * self.step
      low, high = (middle, high) if fits(middle) else (low, middle)
    return low

  def _fits(self, made: Sample) -> bool:
    return self.count(made.prompt) + self.new_tokens <= self.length

  def _too_short(self, made: Sample) -> str:
    least = self.count(made.prompt) + self.new_tokens
    return (
      f"{self.name} does not fit into {self.length} tokens: its smallest "
      f"question has {least}, {self.new_tokens} of them for the answer; give "
      "a larger length"
    )

  def _make(self, index: int, size: int, depth: float | None) -> Sample:
    """A question with a haystack of `size` units."""
    task, rng = self.task, np.random.default_rng([self.seed, index])
    keys = _keys(rng, task.key, task.keys)
    values = [
      [_value(rng, task.value) for _ in range(task.values)] for _ in keys
    ]
    asked = rng.choice(len(keys), task.queries, replace=False)
    told = [
      (i in asked, _NEEDLE.format(kind=task.value, key=key, value=value))
      for i, (key, some) in enumerate(zip(keys, values))
      for value in some
    ]
    order = np.random.default_rng(_ORDER_SEED).permutation(len(told))
    told = [told[i] for i in order]
    context = self._context(told, size, depth, rng)
    several = task.answers > 1
    prompt = (_SEVERAL if several else _ONE).format(
      kind=task.value, context=context, query=_listed([keys[i] for i in asked])
    )
    return Sample(
      prompt,
      tuple(value for i in asked for value in values[i]),
      tuple(needle for wanted, needle in told if wanted),
      size,
    )

  def _context(
    self,
    told: Sequence[tuple[bool, str]],
    size: int,
    depth: float | None,
    rng: np.random.Generator,
  ) -> str:
    """The haystack with the needles in it."""
    if self.task.haystack == ESSAYS:
      units = sentences(" ".join(_cycled(self._words, size)))
      percents = _percents(told, depth, rng)
      at = [int(len(units) * percent / 100) for percent in percents]
      return " ".join(_laid(units, told, at))
    units = self._lines(told, size, rng)
    if depth is None:
      # Before a line of the haystack, so never at its very end.
      at = sorted(rng.choice(len(units), len(told), replace=False))
    else:
      at = [int(len(units) * depth / 100)]
    return "\n".join(_laid(units, told, at))

  def _lines(
    self, told: Sequence[tuple[bool, str]], size: int, rng: np.random.Generator
  ) -> list[str]:
    """Lines of noise, or of needles with keys that no question asks for."""
    if self.task.haystack == NOISE:
      return [_LINE] * size
    kind, known = self.task.value, "".join(needle for _, needle in told)
    keys = _keys(rng, self.task.key, size + len(told))
    free = [key for key in keys if f" {key} " not in known]
    return [
      _NEEDLE.format(kind=kind, key=key, value=_value(rng, kind))
      for key in free[:size]
    ]

  @functools.cached_property
  def _words(self) -> list[str]:
    return self.text.split()


def continuation(answers: Sequence[str]) -> str:
  """What continues the prompt, where it is right: " a, b, and c"."""
  return " " + _listed(answers)


def string_match(output: str, answers: Sequence[str]) -> float:
  """Share of the answers that the output contains, in whatever case.

  RULER's `string_match_all`, of one question and between 0 and 1.
  """
  output = _CONTROL.sub("\n", output.strip()).strip().lower()
  return float(np.mean([answer.lower() in output for answer in answers]))


def sentences(text: str) -> list[str]:
  """The sentences of a text whose words are one space apart."""
  ends = [match.end() for match in _SENTENCE_END.finditer(text)]
  parts = [text[i:j].strip() for i, j in zip([0, *ends], [*ends, len(text)])]
  return [part for part in parts if part]


def _cycled(units: Sequence[str], size: int) -> list[str]:
  repeats = -(-size // len(units))
  return (list(units) * repeats)[:size]


def _laid(
  units: Sequence[str], told: Sequence[tuple[bool, str]], at: Sequence[int]
) -> list[str]:
  """The units, and each needle before the unit of its number."""
  laid, last = [], 0
  for place, (_, needle) in sorted(zip(at, told), key=lambda pair: pair[0]):
    laid += [*units[last:place], needle]
    last = place
  return laid + list(units[last:])


def _percents(
  told: Sequence[tuple[bool, str]],
  depth: float | None,
  rng: np.random.Generator,
) -> list[float]:
  """The depth of each needle, all different; rising where all are drawn."""
  if depth is None:
    return sorted(rng.choice(DEPTHS, len(told), replace=False))
  free = [d for d in DEPTHS if d != depth]
  others = iter(rng.choice(free, len(told) - 1, replace=False))
  return [depth if wanted else next(others) for wanted, _ in told]


def _keys(rng: np.random.Generator, kind: str, count: int) -> list[str]:
  """Keys, no two alike.

  Raises:
    ValueError: there are not so many.
  """
  if kind == "uuid":
    return [_uuid(rng) for _ in range(count)]
  nouns = len(words.NOUNS)
  pairs = len(words.ADJECTIVES) * nouns
  if count > pairs:
    raise ValueError(
      f"a haystack of {count} needles needs as many keys, and there are {pairs}"
    )
  drawn = rng.choice(pairs, count, replace=False)
  return [
    f"{words.ADJECTIVES[i // nouns]}-{words.NOUNS[i % nouns]}" for i in drawn
  ]


def _value(rng: np.random.Generator, kind: str) -> str:
  if kind == "uuid":
    return _uuid(rng)
  return str(rng.integers(1_000_000, 10_000_000))


def _uuid(rng: np.random.Generator) -> str:
  return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _listed(parts: Sequence[str]) -> str:
  if len(parts) == 1:
    return parts[0]
  return ", ".join(parts[:-1]) + f", and {parts[-1]}"
