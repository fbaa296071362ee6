"""Requests to rows of tokens: pairs, left truncation, rolling windows.

A row is what a model reads and what it is asked for: `inputs` and `targets`,
one after the other. The first target follows the last input; the model reads
all but the last token of both. Tokens are split as lm-evaluation-harness
0.4.13 splits them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nl_jax.eval import requests

BOS = ("none", "always")


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How rows are made and read; part of every result.

  Attributes:
    max_length: tokens that a model reads of a request; more are cut on the
      left.
    window: tokens of a rolling window.
    bos: "always" puts the beginning of a sequence before every request and
      page, as the harness does from 0.4.9.2 on; "none" as before.
    prefix_id: what the first token of a page follows.
    bos_id: of the tokenizer; None where it has none.
  """

  max_length: int
  window: int
  prefix_id: int
  bos: str = "none"
  bos_id: int | None = None

  def __post_init__(self):
    for field in ("max_length", "window"):
      value = getattr(self, field)
      if type(value) is not int or value < 1:
        raise ValueError(f"{field} must be a whole number >= 1, got {value!r}")
    if self.bos not in BOS:
      raise ValueError(f"bos must be none or always, got {self.bos!r}")
    if self.bos == "always" and self.bos_id is None:
      raise ValueError(
        "bos=always needs a tokenizer with a beginning of a sequence, and this "
        "one has none; leave bos=none"
      )

  @property
  def lead(self) -> list[int]:
    """Tokens before every request and page."""
    if self.bos_id is None or self.bos != "always":
      return []
    return [self.bos_id]


class Row(NamedTuple):
  """One row.

  Attributes:
    inputs: int32, at least one token.
    targets: int32, at least one token.
    about: integers that the metrics need, by name; not for the model.
    text: of the targets; "" of a window.
  """

  inputs: np.ndarray
  targets: np.ndarray
  about: dict[str, int]
  text: str = ""


class Rows(NamedTuple):
  """The rows of a task.

  Attributes:
    rows: in order of documents, then of choices or windows.
    truncated: rows that were cut on the left.
  """

  rows: list[Row]
  truncated: int


def encode(
  asked: Sequence[requests.Request | requests.Page],
  tokenizer: Any,
  protocol: Protocol,
  path: Any = "document",
) -> Rows:
  """The rows of requests.

  Args:
    asked: of one task.
    tokenizer: of `nl_jax.data.tokenizers`.
    protocol: lengths and the beginning of a sequence.
    path: of the task's file, for messages.

  Raises:
    ValueError: a continuation without a token, or of more than `max_length`.
  """
  rows: list[Row] = []
  truncated = 0
  # Choices often share their context.
  known: dict[str, list[int]] = {}
  for request in asked:
    if isinstance(request, requests.Page):
      rows += _page(request, tokenizer, protocol)
      continue
    if request.choice_id == 0:
      known.clear()
    try:
      context, targets = pair(
        request.context, request.continuation, tokenizer, protocol, known
      )
      inputs, cut = left_truncate(context, targets, protocol.max_length)
    except ValueError as error:
      raise ValueError(f"{path}:{request.line}: {error}") from error
    truncated += cut
    about = {
      "doc_id": request.doc_id,
      "choice_id": request.choice_id,
      "num_choices": request.num_choices,
      "gold": request.gold,
      "norm_len": request.norm_len,
    }
    text = request.continuation
    rows.append(Row(_ids(inputs), _ids(targets), about, text))
  return Rows(rows, truncated)


def pair(
  context: str,
  continuation: str,
  tokenizer: Any,
  protocol: Protocol,
  known: dict[str, list[int]] | None = None,
) -> tuple[list[int], list[int]]:
  """Tokens of a context and of what follows it.

  Both are encoded as one text and split after the tokens of the context
  alone; the context's spaces at its end go to the continuation.

  Args:
    context, continuation: texts.
    tokenizer: of `nl_jax.data.tokenizers`.
    protocol: for the beginning of a sequence.
    known: tokens of contexts encoded before; grows.

  Raises:
    ValueError: the continuation has no token of its own.
  """
  bare = context.rstrip()
  continuation = context[len(bare) :] + continuation
  known = {} if known is None else known
  if bare not in known:
    known[bare] = protocol.lead + _encoded(tokenizer, bare)
  inputs = known[bare]
  whole = protocol.lead + _encoded(tokenizer, bare + continuation)
  targets = whole[len(inputs) :]
  if not targets:
    raise ValueError(
      f"the continuation {continuation!r} has no token of its own after its "
      "context: this tokenizer joins them"
    )
  return whole[: len(inputs)] or [protocol.prefix_id], targets


def left_truncate(
  inputs: Sequence[int], targets: Sequence[int], max_length: int
) -> tuple[Sequence[int], bool]:
  """The last inputs that leave a model `max_length` tokens to read.

  Returns:
    The inputs, and whether any were cut.

  Raises:
    ValueError: the targets alone are longer than that.
  """
  room = max_length + 1 - len(targets)
  if room < 1:
    raise ValueError(
      f"the continuation has {len(targets)} tokens, more than max_length="
      f"{max_length}; raise max_length"
    )
  return inputs[-room:], len(inputs) > room


def windows(
  tokens: Sequence[int], length: int, prefix_id: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
  """(inputs, targets) of a page: every token is a target exactly once.

  The first window follows the prefix, full ones one old token; the last one
  reads old tokens until it is as long as the others.

  Args:
    tokens: of the page.
    length: tokens that a window reads.
    prefix_id: before the first token.
  """
  for start in range(0, len(tokens), length):
    end = min(start + length, len(tokens))
    if start:
      yield tokens[end - length - 1 : start], tokens[start:end]
    else:
      yield [prefix_id], tokens[:end]


def _page(
  page: requests.Page, tokenizer: Any, protocol: Protocol
) -> Iterator[Row]:
  tokens = protocol.lead + _encoded(tokenizer, page.text)
  about = {"doc_id": page.doc_id, "words": page.words, "bytes": page.bytes}
  cut = windows(tokens, protocol.window, protocol.prefix_id)
  for inputs, targets in cut:
    yield Row(_ids(inputs), _ids(targets), {**about, "tokens": len(targets)})


def _encoded(tokenizer: Any, text: str) -> list[int]:
  return tokenizer.encode(text).tolist()


def _ids(tokens: Sequence[int]) -> np.ndarray:
  return np.asarray(tokens, np.int32)
