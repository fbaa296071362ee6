"""Metrics of a task, from what the rows scored; numpy in float64.

Every function takes literally `(targets, scores)`, as seqio wants it: targets
is the `about` of each row, scores its log-likelihoods and, by name, whether
each target was the most likely. Beside each metric stands its standard error,
`<metric>_stderr`, by the method that `STDERR` names.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SUFFIX = "_stderr"
STDERR = {
  "acc": "sample standard deviation over documents / sqrt(n)",
  "acc_norm": "sample standard deviation over documents / sqrt(n)",
  "perplexity": "delta method: perplexity * standard error of mean nll",
  "word_perplexity": "delta method, pages as clusters",
  "byte_perplexity": "delta method, pages as clusters",
  "token_perplexity": "delta method, pages as clusters",
  "bits_per_byte": "pages as clusters",
}
Targets = Sequence[Mapping[str, int]]
Scores = tuple[Sequence[float], Mapping[str, Sequence[bool]]]


def choices(targets: Targets, scores: Scores) -> dict[str, float]:
  """acc and acc_norm: the most likely choice, in nats or nats a character."""
  found = samples(targets, scores)
  return _means(found, ("acc", "acc_norm"))


def accuracy(targets: Targets, scores: Scores) -> dict[str, float]:
  """acc alone, of tasks whose harness definition has no acc_norm."""
  return _means(samples(targets, scores), ("acc",))


def last_word(targets: Targets, scores: Scores) -> dict[str, float]:
  """LAMBADA: perplexity of a word, and how often it was the most likely."""
  nll = -np.asarray(scores[0], np.float64)
  # A sum of Python floats, in the harness' order.
  perplexity = _exp(sum(nll.tolist()) / len(nll))
  return {
    "perplexity": perplexity,
    "perplexity" + SUFFIX: perplexity * _standard_error(nll),
    **_means(samples(targets, scores), ("acc",)),
  }


def pages(targets: Targets, scores: Scores) -> dict[str, float]:
  """WikiText: perplexity a word, a byte, a token; bits a byte.

  Ratios of sums over all pages, not means over pages.
  """
  nll_D, size_D = _by_page(targets, scores)
  found = {}
  for name in ("word", "byte", "token"):
    rate, error = _ratio(nll_D, size_D[name])
    perplexity = _exp(rate)
    found[f"{name}_perplexity"] = perplexity
    found[f"{name}_perplexity{SUFFIX}"] = perplexity * error
    if name == "byte":
      found["bits_per_byte"] = rate / math.log(2)
      found["bits_per_byte" + SUFFIX] = error / math.log(2)
  return found


_OF = {
  "wikitext": pages,
  "lambada_openai": last_word,
  "piqa": choices,
  "hellaswag": choices,
  "winogrande": accuracy,
  "arc_easy": choices,
  "arc_challenge": choices,
  "social_iqa": accuracy,
  "boolq": accuracy,
}


def of(task: str) -> Callable[[Targets, Scores], dict[str, float]]:
  """The metrics of a task; wikitext_<window> has those of wikitext."""
  return _OF["wikitext" if task.startswith("wikitext") else task]


def samples(targets: Targets, scores: Scores) -> list[dict[str, Any]]:
  """What was scored of each document, to compare two runs pair by pair.

  Returns:
    For documents with choices {doc_id, lls, norm_lens, gold, prediction, acc,
    acc_norm}; with one continuation acc is whether it was the most likely. For
    pages {doc_id, ll, words, bytes, tokens}.

  Raises:
    ValueError: a document without all of its choices.
  """
  by_doc: dict[int, list[int]] = {}
  for i, about in enumerate(targets):
    by_doc.setdefault(about["doc_id"], []).append(i)
  one = _page_sample if "words" in targets[0] else _sample
  return [one(targets, scores, rows) for rows in by_doc.values()]


def _sample(
  targets: Targets, scores: Scores, rows: list[int]
) -> dict[str, Any]:
  rows = sorted(rows, key=lambda i: targets[i]["choice_id"])
  first = targets[rows[0]]
  if len(rows) != first["num_choices"]:
    raise ValueError(
      f"document {first['doc_id']} has {len(rows)} scored choices of "
      f"{first['num_choices']}"
    )
  lls = np.array([scores[0][i] for i in rows], np.float64)
  lengths = np.array([targets[i]["norm_len"] for i in rows], np.float64)
  # The first of equals, as numpy has it.
  prediction = int(np.argmax(lls))
  acc = prediction == first["gold"]
  if len(rows) == 1:
    acc = bool(scores[1]["is_greedy"][rows[0]])
  return {
    "doc_id": first["doc_id"],
    "lls": lls.tolist(),
    "norm_lens": [targets[i]["norm_len"] for i in rows],
    "gold": first["gold"],
    "prediction": prediction,
    "acc": float(acc),
    "acc_norm": float(_argmax_ratio(lls, lengths) == first["gold"]),
  }


def _page_sample(
  targets: Targets, scores: Scores, rows: list[int]
) -> dict[str, Any]:
  about = targets[rows[0]]
  return {
    "doc_id": about["doc_id"],
    "ll": float(np.sum([scores[0][i] for i in rows])),
    "words": about["words"],
    "bytes": about["bytes"],
    "tokens": sum(targets[i]["tokens"] for i in rows),
  }


def _argmax_ratio(lls: np.ndarray, lengths: np.ndarray) -> int:
  with np.errstate(divide="ignore", invalid="ignore"):
    return int(np.argmax(lls / lengths))


def _by_page(
  targets: Targets, scores: Scores
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Nats [D] of each page, and its size in words, bytes and tokens."""
  found = samples(targets, scores)
  column = lambda key: np.array([x[key] for x in found], np.float64)
  sizes = {name: column(f"{name}s") for name in ("word", "byte", "token")}
  return -column("ll"), sizes


def _ratio(nll_D: np.ndarray, size_D: np.ndarray) -> tuple[float, float]:
  """Nats per unit, and its standard error, pages being clusters."""
  # Sums of Python floats: the order of the harness.
  total = sum(size_D.tolist())
  rate = sum(nll_D.tolist()) / total
  count = len(nll_D)
  if count < 2:
    return rate, math.nan
  spread = np.sum(np.square(nll_D - rate * size_D)) * count / (count - 1)
  return rate, float(np.sqrt(spread) / total)


def _means(
  found: list[dict[str, Any]], names: Sequence[str]
) -> dict[str, float]:
  values = {}
  for name in names:
    x_D = np.array([x[name] for x in found], np.float64)
    values[name] = float(np.mean(x_D))
    values[name + SUFFIX] = _standard_error(x_D)
  return values


def _standard_error(x_D: np.ndarray) -> float:
  """Of a mean: the sample standard deviation over the root of n."""
  if len(x_D) < 2:
    return math.nan
  return float(np.std(x_D, ddof=1) / np.sqrt(len(x_D)))


def _exp(x: float) -> float:
  """exp, infinite where it overflows."""
  try:
    return math.exp(x)
  except OverflowError:
    return math.inf
