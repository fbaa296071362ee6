"""RULER's needles: prompts, places, lengths and the metric."""

import re
import uuid

import numpy as np
import pytest

from nl_jax.tasks import needles, words

TEXT = " ".join(
  f"Sentence {i} of a text{'!' if i % 3 else '?'} It goes on."
  for i in range(90)
)
SINGLE = [name for name, task in needles.TASKS.items() if task.answers == 1]
ESSAYS = [
  name for name, task in needles.TASKS.items()
  if task.haystack == needles.ESSAYS
]  # fmt: skip


def make(name, length=2000, **more):
  return needles.Needles(name, length, len, text=TEXT, **more)


def haystack_of(sample):
  """What stands between the first line and the question."""
  _, context = sample.prompt.split("\n", 1)
  return context[: context.rindex("\nWhat ")]


@pytest.mark.parametrize("name", needles.TASKS)
def test_the_seed_and_the_number_decide(name):
  assert make(name).sample(3) == make(name).sample(3)
  prompts = {make(name).sample(i).prompt for i in range(3)}
  assert len(prompts | {make(name, seed=1).sample(0).prompt}) == 4


@pytest.mark.parametrize("name", needles.TASKS)
@pytest.mark.parametrize("length", [1500, 5000])
def test_prompts_fill_the_length_and_never_exceed_it(name, length):
  if length == 5000 and name in ESSAYS:
    length = 9000  # 500 words at a time.
  made = make(name, length)
  for i in range(8):
    sample = made.sample(i)
    assert len(sample.prompt) + 128 <= length
    # Two steps more would not have fitted.
    larger = made._make(i, sample.size + 2 * made.step, None)
    assert len(larger.prompt) + 128 > length


@pytest.mark.parametrize("name", needles.TASKS)
def test_each_needle_is_told_once_and_its_key_asked_for(name):
  task = needles.TASKS[name]
  for i in range(5):
    sample = make(name).sample(i)
    context = haystack_of(sample)
    assert len(sample.answers) == len(sample.needles) == task.answers
    told = re.findall(r"special magic (\w+)s for (\S+) is: (\S+)\.", context)
    assert {kind for kind, _, _ in told} == {task.value}
    asked = [(k, v) for _, k, v in told if v in sample.answers]
    assert sorted(v for _, v in asked) == sorted(sample.answers)
    question = sample.prompt[len(context) :]
    for key, value in asked:
      needle = f"One of the special magic {task.value}s for {key} is: {value}."
      assert context.count(needle) == 1 and needle in sample.needles
      assert f" {key}" in question
    # No other needle answers the question.
    assert sum(k in {k for k, _ in asked} for _, k, _ in told) == task.answers
    if task.haystack == needles.ESSAYS:
      assert len(told) == task.keys * task.values
    elif task.haystack == needles.NOISE:
      assert len(told) == 1
    else:
      assert len(told) == sample.size + 1 == len(context.split("\n"))


def test_the_wording_of_one_and_of_several():
  one = make("niah_single_3").sample(0).prompt
  assert one.startswith("A special magic uuid is hidden within the following")
  key = re.search(r"uuids for (\S+) is: ", one)[1]
  assert one.endswith(
    f"\nWhat is the special magic uuid for {key} mentioned in the provided "
    f"text? The special magic uuid for {key} mentioned in the provided text is"
  )
  several = make("niah_multiquery").sample(0).prompt
  assert several.startswith("Some special magic numbers are hidden within the")
  assert several.endswith(" mentioned in the provided text are")
  assert re.search(
    r"What are all the special magic numbers for \S+, \S+, \S+, and \S+ "
    r"mentioned in the provided text\? The special magic numbers for",
    several,
  )


def test_the_noise_is_the_line_of_the_reference():
  lines = haystack_of(make("niah_single_1").sample(0)).split("\n")
  (needle,) = [x for x in lines if "magic" in x]
  assert {x for x in lines if x != needle} == {
    "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    "There and back again."
  }


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("depth", [0, 33, 50, 100])
def test_a_needle_stands_at_its_depth(name, depth):
  for i in range(4):
    sample = make(name, 4000).sample(i, depth)
    context, (needle,) = haystack_of(sample), sample.needles
    if needles.TASKS[name].haystack == needles.ESSAYS:
      for other in re.findall(
        r"One of the special magic [^:]*: \S+\.", context
      ):
        if other != needle:
          context = context.replace(other + " ", "").replace(" " + other, "")
      before, after = context.split(needle)
      units = [needles.sentences(x.strip()) for x in (before, after)]
    else:
      units = [
        [line for line in x.split("\n") if line] for x in context.split(needle)
      ]
    total = sum(map(len, units))
    assert len(units[0]) == int(total * depth / 100)


def test_depths_that_are_drawn_cover_the_haystack():
  made = make("niah_single_1", 4000)
  places = []
  for i in range(60):
    sample = made.sample(i)
    context = haystack_of(sample)
    places.append(context.index(sample.needles[0]) / len(context))
  assert min(places) < 0.1 and max(places) > 0.85
  assert 0.35 < np.mean(places) < 0.6


def test_a_question_is_the_same_at_every_length_and_depth():
  answers = {
    make("niah_single_2", length).sample(4, depth).answers
    for length in (1200, 2000)
    for depth in (None, 0, 80)
  }
  assert len(answers) == 1


def test_several_needles_stand_at_different_depths_in_one_order():
  rng = np.random.default_rng(0)
  drawn = needles._percents([(False, "")] * 4, None, rng)
  assert len(set(drawn)) == 4 and drawn == sorted(drawn)
  assert set(drawn) <= set(needles.DEPTHS) and len(needles.DEPTHS) == 40


def test_values():
  numbers = [make("niah_single_1").sample(i).answers[0] for i in range(30)]
  assert all(1_000_000 <= int(x) <= 9_999_999 for x in numbers)
  (value,) = make("niah_multikey_3").sample(0).answers
  assert uuid.UUID(value).version == 4 and value == str(uuid.UUID(value))


def test_words():
  for some in (words.ADJECTIVES, words.NOUNS):
    assert len(some) >= 200 and len(set(some)) == len(some)
    assert all(re.fullmatch("[a-z]+", word) for word in some)
  assert list(words.ADJECTIVES) == sorted(words.ADJECTIVES)


def test_sentences():
  text = 'He said "Go!" (Twice.) It is 3.5 m. Why? end'
  assert needles.sentences(text) == [
    'He said "Go!"', "(Twice.)", "It is 3.5 m.", "Why?", "end",
  ]  # fmt: skip


def test_string_match():
  match = needles.string_match
  assert match(" 1234567, and 7654321.", ["1234567", "7654321"]) == 1
  assert match("is ABC-def", ["abc-DEF", "x"]) == 0.5
  assert match("12345", ["1234567"]) == 0
  # A control character is a line break: it does not join what it parts.
  assert match("123\x004567", ["1234567"]) == 0
  assert match("one\x07two", ["one\ntwo"]) == 1


def test_continuation():
  assert needles.continuation(["5"]) == " 5"
  assert needles.continuation(["5", "6", "7"]) == " 5, 6, and 7"


def test_mistakes():
  with pytest.raises(ValueError, match="does not fit into 300 tokens: its"):
    make("niah_single_1", 300).sample(0)
  with pytest.raises(ValueError, match="asks for 4 values, each at a depth"):
    make("niah_multivalue").sample(0, 50)
  with pytest.raises(ValueError, match="0 to 100 percent, got 120"):
    make("niah_single_1").sample(0, 120)
  with pytest.raises(ValueError, match="hides needles in a text, and it has"):
    needles.Needles("niah_single_2", 2000, len)
