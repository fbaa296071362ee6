"""Formal languages read symbol by symbol, with a class after each.

Definitions and windows are those of Bhattamishra et al. (2009.11264) and Irie
et al. (2310.16076): the model sees a prefix and tells its class; a string
counts only if every class of it is right. Bin 0 has the lengths of training,
Bin 1 longer strings.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from nl_jax.tasks import batches

_OPENING = {")": "(", "]": "["}
# Of the bracket grammar: S -> (S) or [S], S -> S S, else the end.
_WRAP, _TWO = 0.5, 0.25
_TRIES = 1000  # Draws a wanted string, before a window is found too small.


class Language(NamedTuple):
  """One language.

  Attributes:
    symbols: its alphabet.
    classes: what a prefix may be, as the tables name it.
    label: string -> the class number of each prefix.
    draw: (rng, low, high) -> a string of the window, or None: draw again. None
      where `every` is there.
    every: (low, high) -> all strings of the window.
    windows: of Bin 0 and Bin 1: least and largest length, or n where the
      language counts it.
    longest: tokens of the longest string of either bin.
  """

  symbols: str
  classes: tuple[str, ...]
  label: Callable[[str], list[int]]
  windows: tuple[tuple[int, int], tuple[int, int]]
  longest: tuple[int, int]
  draw: Callable[..., str | None] | None = None
  every: Callable[[int, int], list[str]] | None = None

  @property
  def vocab_size(self) -> int:
    """Padding, symbols, classes: each has an id of its own."""
    return 1 + len(self.symbols) + len(self.classes)


def splits(
  name: str, rng: np.random.Generator, *, train: int, test: int
) -> dict[str, batches.Batch]:
  """The batches `train`, `bin0` and `bin1` of a language.

  Ids: 0 padding, then the symbols, then the classes. Where a window has few
  strings a bin has each once and `train` repeats them; else all strings
  differ, those of `train` and `bin0` too.

  Args:
    name: a key of `LANGUAGES`.
    rng: decides all.
    train: strings to learn from.
    test: strings of a bin, at most.
  """
  language = LANGUAGES[name]
  (low, high), beyond = language.windows
  if language.every:
    known = language.every(low, high)
    drawn = [known[i] for i in rng.integers(0, len(known), train)]
    bins = (known[:test], language.every(*beyond)[:test])
  else:
    first = distinct(language, rng, low, high, train + test)
    drawn = first[:train]
    bins = (first[train:], distinct(language, rng, *beyond, test))
  short, long = language.longest
  return {
    "train": encode(language, drawn, short),
    "bin0": encode(language, bins[0], short),
    "bin1": encode(language, bins[1], long),
  }


def encode(
  language: Language, strings: Collection[str], length: int
) -> batches.Batch:
  """Strings as a batch of that many tokens."""
  ids = {symbol: 1 + i for i, symbol in enumerate(language.symbols)}
  first = 1 + len(ids)
  return batches.labelled(
    [[ids[symbol] for symbol in string] for string in strings],
    [[first + c for c in language.label(string)] for string in strings],
    length,
  )


def distinct(
  language: Language,
  rng: np.random.Generator,
  low: int,
  high: int,
  count: int,
) -> list[str]:
  """Strings of a window that all differ, in the order drawn.

  Raises:
    ValueError: the window has too few.
  """
  assert language.draw is not None  # Others are asked for `every` one.
  found: dict[str, None] = {}
  for _ in range(_TRIES * count):
    if len(found) == count:
      return list(found)
    string = language.draw(rng, low, high)
    if string is not None:
      found[string] = None
  raise ValueError(
    f"found {len(found)} strings of {low} to {high} symbols, expected {count}: "
    "ask for fewer"
  )


def _draw_parity(rng: np.random.Generator, low: int, high: int) -> str | None:
  """Each symbol 0 or 1 with the same probability, else the end."""
  mean = (low + high) / 2
  length = rng.geometric(1 / (1 + mean)) - 1
  bits = rng.integers(0, 2, min(length, high + 1))
  string = "".join(map(str, bits)) + ("1" if bits.sum() % 2 else "")
  return string if low <= len(string) <= high else None


def _draw_brackets(rng: np.random.Generator, low: int, high: int) -> str | None:
  """A well-nested string of two kinds of brackets."""
  done, todo = [], ["S"]
  while todo:
    symbol = todo.pop()
    if symbol != "S":
      done.append(symbol)
    elif (u := rng.random()) < _WRAP:
      left, right = "()" if u < _WRAP / 2 else "[]"
      todo += [right, "S", left]
    elif u < _WRAP + _TWO:
      todo += ["S", "S"]
    if len(done) > high or len(todo) > 2 * high:
      return None
  return "".join(done) if low <= len(done) <= high else None


def _draw_shuffle(rng: np.random.Generator, low: int, high: int) -> str | None:
  """The two kinds of a well-nested string, laid into each other at random."""
  string = _draw_brackets(rng, low, high)
  if string is None:
    return None
  kinds = [[s for s in string if s in kind] for kind in ("()", "[]")]
  turns = rng.permutation([0] * len(kinds[0]) + [1] * len(kinds[1]))
  queues = [iter(kind) for kind in kinds]
  return "".join(next(queues[turn]) for turn in turns)


def _label_brackets(string: str) -> list[int]:
  """Bit 0: a ( is open after this symbol; bit 1: a [ is."""
  depth, labels = {"(": 0, "[": 0}, []
  for symbol in string:
    depth[_OPENING.get(symbol, symbol)] += -1 if symbol in _OPENING else 1
    labels.append((depth["("] > 0) + 2 * (depth["["] > 0))
  return labels


def _label_parity(string: str) -> list[int]:
  ones = np.cumsum([symbol == "1" for symbol in string])
  return [int(count % 2 == 0) for count in ones]


def _label_every(period: int) -> Callable[[str], list[int]]:
  return lambda string: [int((t + 1) % period == 0) for t in range(len(string))]


def _label_counted(string: str) -> list[int]:
  """What may follow: {a,b} on each a, then the next symbol, at last the end."""
  names = {"b": 1, "c": 2}
  end = 1 + len(set(string[1:]) - {"a"})
  after = [*string[1:], ""]
  return [
    0 if symbol == "a" else names.get(following, end)
    for symbol, following in zip(string, after)
  ]


def _repeated(unit: str) -> Callable[[int, int], list[str]]:
  size = len(unit)
  return lambda low, high: [
    unit * m for m in range(-(-low // size), high // size + 1)
  ]


def _counted(symbols: str) -> Callable[[int, int], list[str]]:
  return lambda low, high: [
    "".join(symbol * n for symbol in symbols) for n in range(low, high + 1)
  ]


_MEMBER = ("no", "yes")
_DEPTHS = ("none open", "(", "[", "both")
_SHORT, _LONG = (2, 50), (51, 100)
_EVEN = ((2, 50), (52, 100))

LANGUAGES = {
  "parity": Language(
    "01", _MEMBER, _label_parity, (_SHORT, _LONG), (50, 100), _draw_parity
  ),
  "aa": Language(
    "a", _MEMBER, _label_every(2), _EVEN, (50, 100), every=_repeated("aa")
  ),
  "abab": Language(
    "ab", _MEMBER, _label_every(4), _EVEN, (48, 100), every=_repeated("abab")
  ),
  "anbn": Language(
    "ab", ("{a,b}", "b", "T"), _label_counted, (_SHORT, _LONG), (100, 200),
    every=_counted("ab"),
  ),
  "anbncn": Language(
    "abc", ("{a,b}", "b", "c", "T"), _label_counted, (_SHORT, _LONG),
    (150, 300), every=_counted("abc"),
  ),
  "shuffle_2": Language(
    "()[]", _DEPTHS, _label_brackets, _EVEN, (50, 100), _draw_brackets
  ),
  # Shuffles in the strict sense; the reference samples well-nested strings.
  "shuffle_2_interleaved": Language(
    "()[]", _DEPTHS, _label_brackets, _EVEN, (50, 100), _draw_shuffle
  ),
}  # fmt: skip
