"""Metrics and their standard errors against loops over documents."""

import math

import numpy as np
import pytest

from nl_jax.eval import metrics


def pairs(docs):
  """Targets and scores of [(gold, [(ll, norm_len, greedy), ...]), ...]."""
  targets, lls, greedy = [], [], []
  for doc_id, (gold, choices) in enumerate(docs):
    for choice_id, (ll, norm_len, is_greedy) in enumerate(choices):
      targets.append(dict(
        doc_id=doc_id, choice_id=choice_id, num_choices=len(choices),
        gold=gold, norm_len=norm_len,
      ))  # fmt: skip
      lls.append(ll)
      greedy.append(is_greedy)
  return targets, (lls, {"is_greedy": greedy})


DOCS = [
  (0, [(-1.0, 1, False), (-2.0, 4, False)]),  # acc; by length the other.
  (1, [(-3.0, 2, False), (-3.0, 3, False)]),  # A tie: the first.
  (1, [(-9.0, 5, False), (-4.0, 1, False)]),
]


def test_accuracies():
  found = metrics.choices(*pairs(DOCS))
  assert found["acc"] == 2 / 3
  assert found["acc_norm"] == 1 / 3  # Only the second.
  p, n = 2 / 3, 3
  error = math.sqrt(p * (1 - p) / (n - 1))
  assert found["acc_stderr"] == pytest.approx(error, rel=1e-12)
  assert set(metrics.accuracy(*pairs(DOCS))) == {"acc", "acc_stderr"}


def test_rows_may_come_in_any_order():
  targets, (lls, aux) = pairs(DOCS)
  order = np.random.default_rng(1).permutation(len(targets))
  mixed = (
    [targets[i] for i in order],
    ([lls[i] for i in order], {"is_greedy": [False] * len(order)}),
  )
  assert metrics.choices(*mixed) == metrics.choices(targets, (lls, aux))


def test_a_document_must_have_all_choices():
  targets, (lls, aux) = pairs(DOCS)
  with pytest.raises(ValueError, match="document 2 has 1 scored choices of 2"):
    metrics.choices(targets[:-1], (lls[:-1], aux))


def test_last_words():
  lls = [-1.0, -2.0, -4.5]
  targets, scores = pairs([(0, [(ll, 3, ll > -3)]) for ll in lls])
  found = metrics.last_word(targets, scores)
  assert found["perplexity"] == math.exp(2.5)
  assert found["acc"] == 2 / 3
  spread = np.std([1, 2, 4.5], ddof=1) / math.sqrt(3)
  assert found["perplexity_stderr"] == pytest.approx(math.exp(2.5) * spread)


def test_pages_are_ratios_of_sums_and_clusters():
  rng = np.random.default_rng(0)
  sizes = rng.integers(5, 50, (6, 3))
  targets, lls, nll = [], [], np.zeros(6)
  for page, (words, size, tokens) in enumerate(sizes):
    for part in (tokens // 2, tokens - tokens // 2):
      targets.append(dict(doc_id=page, words=words, bytes=size, tokens=part))
      lls.append(-float(rng.uniform(1, 9)))
      nll[page] -= lls[-1]
  found = metrics.pages(targets, (lls, {"is_greedy": [False] * 12}))
  for column, name in enumerate(("word", "byte", "token")):
    weight = sizes[:, column]
    rate = nll.sum() / weight.sum()
    residual = nll - rate * weight
    error = math.sqrt(6 / 5 * (residual**2).sum()) / weight.sum()
    value = found[f"{name}_perplexity"]
    assert value == pytest.approx(math.exp(rate), rel=1e-12)
    assert found[f"{name}_perplexity_stderr"] == pytest.approx(value * error)
  assert found["bits_per_byte"] == pytest.approx(
    math.log2(found["byte_perplexity"])
  )
  assert set(found) == {
    f"{name}{end}"
    for name in metrics.STDERR
    if "per" in name and name != "perplexity"
    for end in ("", "_stderr")
  }


def test_one_document_has_no_error_and_large_ones_no_end():
  found = metrics.choices(*pairs(DOCS[:1]))
  assert found["acc"] == 1 and math.isnan(found["acc_stderr"])
  targets, scores = pairs([(0, [(-1e4, 3, False)])])
  assert metrics.last_word(targets, scores)["perplexity"] == math.inf


def test_samples_keep_what_a_paired_test_needs():
  first = metrics.samples(*pairs(DOCS))[0]
  assert first == {
    "doc_id": 0, "lls": [-1.0, -2.0], "norm_lens": [1, 4], "gold": 0,
    "prediction": 0, "acc": 1.0, "acc_norm": 0.0,
  }  # fmt: skip
