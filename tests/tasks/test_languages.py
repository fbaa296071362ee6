"""Formal languages: labels against membership, windows, distinct strings."""

import itertools

import numpy as np
import pytest

from nl_jax.tasks import languages

LANGUAGES = languages.LANGUAGES
SMALL = dict(train=300, test=60)


def strings_of(name, batch):
  symbols = LANGUAGES[name].symbols
  return [
    "".join(symbols[i - 1] for i in row[: int(real.sum())])
    for row, real in zip(batch["inputs"], batch["segment_ids"])
  ]


def classes_of(name, batch, row):
  language = LANGUAGES[name]
  real = batch["segment_ids"][row] > 0
  first = 1 + len(language.symbols)
  return [language.classes[i - first] for i in batch["targets"][row][real]]


def splits(name, seed=0):
  return languages.splits(name, np.random.default_rng(seed), **SMALL)


MEMBER = {
  "parity": lambda s: s.count("1") % 2 == 0,
  "aa": lambda s: len(s) % 2 == 0,
  "abab": lambda s: s == "abab" * (len(s) // 4),
}


@pytest.mark.parametrize("name", MEMBER)
def test_labels_are_membership_of_the_prefix(name):
  label = LANGUAGES[name].label
  if name == "parity":
    every = (
      "".join(s)
      for n in range(1, 13)
      for s in itertools.product("01", repeat=n)
    )
  else:
    unit = "ab" if name == "abab" else "a"
    every = [(unit * 12)[:n] for n in range(1, 13)]
  for string in every:
    wanted = [int(MEMBER[name](string[: t + 1])) for t in range(len(string))]
    assert label(string) == wanted, string


@pytest.mark.parametrize("name", ["anbn", "anbncn"])
def test_labels_are_what_may_follow(name):
  symbols = LANGUAGES[name].symbols
  members = {"".join(s * n for s in symbols) for n in range(1, 30)}
  # Prefix -> the symbols (T: the end) that a member continues with.
  follow = {}
  for member in members:
    for t in range(len(member)):
      after = member[t + 1] if t + 1 < len(member) else "T"
      follow.setdefault(member[: t + 1], set()).add(after)
  language = LANGUAGES[name]
  for n in range(2, 5):
    string = "".join(s * n for s in symbols)
    for t, number in enumerate(language.label(string)):
      wanted = language.classes[number].strip("{}").split(",")
      assert follow[string[: t + 1]] == set(wanted), (string, t)


def test_the_target_of_two():
  language = LANGUAGES["anbncn"]
  got = [language.classes[i] for i in language.label("aabbcc")]
  assert got == ["{a,b}", "{a,b}", "b", "c", "c", "T"]


def test_brackets_are_labelled_by_their_open_kinds():
  got = LANGUAGES["shuffle_2"].label("([)]()")
  assert [LANGUAGES["shuffle_2"].classes[i] for i in got] == [
    "(", "both", "[", "none open", "(", "none open",
  ]  # fmt: skip


def is_nested(string):
  while (shorter := string.replace("()", "").replace("[]", "")) != string:
    string = shorter
  return not string


def test_brackets_are_nested_and_shuffles_are_not():
  drawn = strings_of("shuffle_2", splits("shuffle_2")["train"])
  assert all(is_nested(s) for s in drawn)
  drawn = strings_of(
    "shuffle_2_interleaved", splits("shuffle_2_interleaved")["train"]
  )
  assert not all(is_nested(s) for s in drawn)
  for kind in ("()", "[]"):
    assert all(is_nested("".join(x for x in s if x in kind)) for s in drawn)


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_seed_decides(name):
  for split, batch in splits(name).items():
    for key, x in splits(name)[split].items():
      np.testing.assert_array_equal(x, batch[key])
  if LANGUAGES[name].draw:
    assert strings_of(name, splits(name, 1)["bin1"]) != strings_of(
      name, splits(name)["bin1"]
    )


@pytest.mark.parametrize("name", LANGUAGES)
def test_bins_have_the_lengths_of_their_windows(name):
  language, found = LANGUAGES[name], splits(name)
  counts = len(language.symbols) if name.startswith("anbn") else 1
  for split, window in zip(
    ("train", "bin0", "bin1"), (language.windows[0], *language.windows)
  ):
    lengths = [len(s) // counts for s in strings_of(name, found[split])]
    assert window[0] <= min(lengths) and max(lengths) <= window[1]
  for split, longest in zip(("bin0", "bin1"), language.longest):
    assert found[split]["inputs"].shape[1] == longest


def test_distinct_strings_of_the_short_languages():
  count = lambda name: [
    len(set(strings_of(name, batch))) for batch in splits(name).values()
  ]
  assert count("aa")[1:] == [25, 25]
  assert count("abab")[1:] == [12, 13]
  assert count("anbn")[1:] == [49, 50]
  # Training repeats them.
  assert count("abab")[0] == 12


@pytest.mark.parametrize("name", ["parity", "shuffle_2"])
def test_what_is_tested_was_not_trained(name):
  found = {k: strings_of(name, v) for k, v in splits(name).items()}
  assert [len(set(x)) for x in found.values()] == [300, 60, 60]
  assert not set(found["train"]) & set(found["bin0"])


def test_parity_has_members_alone_and_both_symbols():
  found = strings_of("parity", splits("parity")["train"])
  assert all(MEMBER["parity"](s) for s in found)
  ones = sum(s.count("1") for s in found) / sum(map(len, found))
  assert 0.45 < ones < 0.55


def test_inputs_and_classes_have_ids_of_their_own():
  language, batch = LANGUAGES["anbncn"], splits("anbncn")["bin0"]
  assert set(batch["inputs"].ravel()) == {0, 1, 2, 3}
  assert set(batch["targets"][batch["weights"] > 0]) == {4, 5, 6, 7}
  assert language.vocab_size == 8
  assert classes_of("anbncn", batch, 0) == [
    "{a,b}", "{a,b}", "b", "c", "c", "T",
  ]  # fmt: skip


def test_a_window_without_enough_strings():
  with pytest.raises(ValueError, match="found 3 strings of 1 to 2 symbols"):
    languages.distinct(LANGUAGES["parity"], np.random.default_rng(0), 1, 2, 9)
