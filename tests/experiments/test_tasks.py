"""Needles, recall and languages: scores by hand, trials, commands, mistakes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.cli import named
from experiments.tasks import arms, lstm, problems, tables, training
from experiments.tasks import needles as asking
from nl_jax import stream
from nl_jax.data import tokenizers
from nl_jax.stream import reader
from nl_jax.tasks import batches, languages, needles
from tests.experiments import forked
from tests.laws.models import MODELS

BYTES = tokenizers.Bytes()
LENGTH, NEW = 700, 12
PLAN = training.Plan(40, 8, 1e-2, 20)


# A memory in chunks and a cache: both must not see a row's padding.
@pytest.fixture(scope="module", params=["transformer", "deltanet"])
def subject(request):
  net = MODELS[request.param]()
  with pytest.MonkeyPatch.context() as patch:
    # Two shapes to compile, and several pieces a prompt.
    patch.setattr(asking, "_PIECE", 16)
    patch.setattr(reader, "_PIECES", (16, 1))
    yield asking.Subject(net, net.init(jax.random.key(1)), BYTES, {})


def questions(count=3):
  made = needles.Needles(
    "niah_single_1", LENGTH, lambda x: len(BYTES.encode(x)), new_tokens=NEW
  )
  return [made.sample(i, 50) for i in range(count)]


def test_rows_together_answer_as_alone(subject):
  asked = questions()
  assert len({len(q.prompt) for q in asked}) > 1
  together = asking.answer(subject, asked, LENGTH, NEW)
  for question, got in zip(asked, together):
    reader = stream.start(subject.net, subject.params, length=LENGTH)
    reader.read(BYTES.encode(question.prompt)[None])
    drawn = [x[0] for x in reader.sample(NEW, vocab_size=259, temperature=0.0)]
    end = drawn.index(BYTES.end_id) if BYTES.end_id in drawn else NEW
    assert got.output == BYTES.decode(drawn[:end])


def test_nats_are_those_of_the_stream(subject):
  asked = questions()
  together = asking.answer(subject, asked, LENGTH, 1)
  for question, got in zip(asked, together):
    reader = stream.start(subject.net, subject.params, length=LENGTH)
    reader.read(BYTES.encode(question.prompt)[None])
    gold = BYTES.encode(" " + question.answers[0])
    assert len(gold) == 8
    nats = reader.score(gold[None])[0].mean()
    np.testing.assert_allclose(got.nats, nats, rtol=1e-4)
    assert not got.forced and got.match == 0


def test_forced_is_every_token_the_likeliest(subject):
  ids = [BYTES.encode(text) for text in ("one text", "another one", "third")]
  start = lambda: asking._prefilled(
    stream.start(subject.net, subject.params, 3, LENGTH), ids
  )
  likely = np.stack(
    list(start().sample(8, vocab_size=259, temperature=0.0)), axis=1
  )
  other = likely.copy()
  other[1, 3] = (other[1, 3] + 1) % 259
  forced, _ = asking._forced(start(), list(likely), 259)
  assert forced.all()
  forced, _ = asking._forced(start(), list(other), 259)
  np.testing.assert_array_equal(forced, [True, False, True])


def test_rows_to_learn_from_ask_for_the_answer_alone():
  asked = asking.Asked("niah_single_1", (500,), (), 1, 8, 0)
  nothing = asking.Haystack("", {})
  rows = asking._rows(BYTES, asked, nothing, 4)
  assert rows["inputs"].shape == (4, 500)
  for i in range(4):
    question = asking._needles(BYTES, asked, nothing, 500).sample(i)
    at = np.flatnonzero(rows["weights"][i])
    answer = BYTES.decode(rows["targets"][i][at])
    assert answer == " " + question.answers[0]
    # The model has read the prompt, then what it should have said so far.
    read = BYTES.decode(rows["inputs"][i][: at[-1] + 1])
    assert read == question.prompt + answer[:-1]


def test_cells():
  asked = asking.Asked("niah_single_1", (10, 20), (), 1, 1, 0)
  assert asked.cells()[:2] == [(10, 0.0), (10, 25.0)]
  assert len(asked.cells()) == 10
  drawn = dataclasses.replace(asked, depths=None)
  assert drawn.cells() == [(10, None), (20, None)]
  several = dataclasses.replace(asked, task="niah_multivalue")
  assert several.cells() == drawn.cells()


def test_an_lstm_learns_to_count_to_two():
  rows = languages.splits("aa", np.random.default_rng(0), train=200, test=50)
  train = rows.pop("train")
  net = lstm.LSTM(languages.LANGUAGES["aa"].vocab_size, width=16, layers=1)
  fit = lambda seed: training.fit(
    net, train, rows, training.Plan(240, 16, 1e-2, 80), seed=seed,
    done=lambda history: False,
  )  # fmt: skip
  history = fit(0).history
  assert [h["step"] for h in history] == [80, 160, 240]
  # Chance is a half.
  assert history[-1]["bin1/position"] > 0.95
  assert history == fit(0).history
  assert history[-1]["loss"] != fit(1).history[-1]["loss"]


def test_tests_do_not_depend_on_the_batch():
  rows = languages.splits("anbn", np.random.default_rng(0), train=8, test=11)
  net = lstm.LSTM(6, width=8, layers=1)
  params, batch = net.init(jax.random.key(0)), rows["bin0"]
  test = training._tester(net)
  whole, parts = (test(params, batch, at_once) for at_once in (11, 4))
  assert whole["position"] == parts["position"]
  np.testing.assert_allclose(whole["loss"], parts["loss"], rtol=1e-5)
  logits, _, _ = net.apply(params, batch["inputs"])
  predicted = np.argmax(np.asarray(logits), -1)
  assert whole["position"] == batches.position_accuracy(predicted, batch)
  right = np.exp(np.asarray(jax.nn.log_softmax(logits)))
  chosen = np.take_along_axis(right, batch["targets"][..., None], -1)[..., 0]
  loss = -np.log(chosen)[batch["weights"] > 0].mean()
  np.testing.assert_allclose(whole["loss"], loss, rtol=1e-5)


def test_training_stops_when_it_is_told_to():
  rows = languages.splits("abab", np.random.default_rng(0), train=16, test=9)
  train = rows.pop("train")
  fitted = training.fit(
    lstm.LSTM(5, width=8, layers=1), train, rows,
    PLAN._replace(eval_every=10), seed=0,
    done=lambda history: len(history) == 2,
  )  # fmt: skip
  assert [h["step"] for h in fitted.history] == [10, 20]


def test_a_rate_that_is_too_high_is_told():
  rows = languages.splits("abab", np.random.default_rng(0), train=16, test=9)
  train = rows.pop("train")
  plan = PLAN._replace(learning_rate=1e18, weight_decay=1.0)
  with pytest.raises(FloatingPointError, match="lower --learning_rates"):
    training.fit(
      lstm.LSTM(5, width=8, layers=1), train, rows, plan, seed=0,
      done=lambda history: False,
    )  # fmt: skip


def history(*rows):
  names = ("bin0/sequence", "bin0/loss", "bin1/sequence")
  return [
    {"step": 10 * (i + 1), **dict(zip(names, row))}
    for i, row in enumerate(rows)
  ]


def test_the_choice_by_bin_0_does_not_see_bin_1():
  unsure = history((0.9, 0.2, 0.0), (1.0, 0.1, 0.1), (1.0, 0.05, 0.0))
  assert problems.on_bin0(unsure)["step"] == 30  # The lower loss of equals.
  assert problems.on_bin1(unsure)["step"] == 20
  # Once it is made, training longer does not change it.
  sure = history((1.0, 1e-4, 0.3), (1.0, 1e-5, 1.0), (1.0, 1e-6, 1.0))
  assert problems.on_bin0(sure)["step"] == 10
  assert problems.on_bin1(sure)["step"] == 20
  done = [problems.done("aa", None, sure[: i + 1]) for i in range(2)]
  assert done == [False, True]
  assert not problems.done("aa", None, history((1.0, 0.1, 1.0)))


def test_mqar_is_done_when_what_is_trained_is_solved():
  size = dataclasses.replace(
    problems.sizes("mqar", "smoke"), lengths=(32, 64), pairs=(2, 4)
  )
  assert problems.settings(size) == [(32, 2), (32, 4), (64, 2), (64, 4)]
  row = {f"{n} in 32/position": 0.995 for n in (2, 4)}
  assert problems.done("mqar", size, [row])  # Longer ones play no part.
  row["4 in 32/position"] = 0.98
  assert not problems.done("mqar", size, [row])


def test_rows_of_mqar_are_as_many_as_asked_for():
  size = dataclasses.replace(
    problems.sizes("mqar", "smoke"), train=1100, test=7, pairs=(2, 4)
  )
  made = problems.make("mqar", size)
  assert made.train["inputs"].shape == (2200, 32)
  asked = made.train["weights"].sum(axis=1)
  assert sorted(set(asked)) == [2, 4] and (asked == 2).sum() == 1100
  assert {k: len(x["inputs"]) for k, x in made.tests.items()} == {
    "2 in 32": 7, "4 in 32": 7,
  }  # fmt: skip


def test_a_config_is_fitted_to_the_task():
  config = named.load_config("hope_linear_tiny")
  with config.unlocked():
    config.model.mixer.eta_max = 2.0
  arm = arms.chosen("hope_linear_tiny", config)
  assert arm.title == "hope_linear_tiny mixer.eta_max=2.0"
  net = arms.model(arm, 7, 100, 640)
  assert net.vocab_size == 7 and net.mixer.eta_max == 2.0
  # Updated at the same steps: every one, each 4th, each 16th.
  assert net.cms.periods == (640, 2560, 10240)
  for preset in problems.PRESETS:
    for task in ("mqar", "parity"):
      for one in arms.compared(task, preset):
        assert arms.model(one, 9, 64, 640).vocab_size == 9


@pytest.mark.parametrize("field", ["train.steps", "model.vocab_size"])
def test_what_the_task_decides_is_refused(field):
  config = named.load_config("hope_tiny")
  group, _, name = field.partition(".")
  with config.unlocked():
    config[group][name] = 400
  with pytest.raises(ValueError, match=f"{field} is decided by the task"):
    arms.chosen("hope_tiny", config)


def trial(arm, rate, seed, accuracy):
  return {
    "arm": arm, "learning_rate": rate, "seed": seed, "parameters": 1000,
    "history": [{"step": 5, "4 in 32/position": accuracy}],
  }  # fmt: skip


def test_the_table_shows_the_best_rate_over_seeds():
  size = problems.sizes("mqar", "smoke")
  trials = [
    trial("A", 1e-3, 0, 0.9), trial("A", 1e-3, 1, 0.1),
    trial("A", 1e-2, 0, 0.7), trial("A", 1e-2, 1, 0.5),
    trial("B", 1e-3, 0, 0.25),
  ]  # fmt: skip
  text = tables.mqar(trials, size)
  assert "| A | 0.001M | 0.01 | 5 | 2 | 60.0 (50.0 to 70.0) |" in text
  assert "| B | 0.001M | 0.001 | 5 | 1 | 25.0 |" in text


def test_the_tables_of_languages_choose_differently():
  runs = [
    {"arm": "A", "learning_rate": 1e-3, "seed": seed, "history": history(*rows)}
    for seed, rows in enumerate((
      ((0.5, 1.0, 0.8), (0.9, 0.5, 0.25)), ((0.7, 1.0, 0.5), (0.8, 0.9, 0.0)),
    ))
  ]  # fmt: skip
  text = tables.formal({"aa": runs}, problems.sizes("aa", "small"))
  published, honest = text.split("Honestly")
  assert "| A | 2 | 50.0 / 80.0 |" in published  # Seed 0, its first test.
  assert "| *Hope, published* |  | 100 / 100 |" in published
  assert "| A | 2 | 85.0 / 12.5 |" in honest  # Both last tests, averaged.


SIZES = ["--train=64", "--test=8", "--steps=4", "--eval_every=2",
         "--batch_size=8"]  # fmt: skip
MQAR = ["tasks", "--task=mqar", "--preset=smoke", "--folder=r", *SIZES]


def test_the_commands(tmp_path):
  one = "--config=transformer_tiny:smoke"
  niah = ["tasks", "--workdir=w", "--task=niah_single_1", "--new_tokens=4"]
  niah += ["--lengths=600", "--samples=2"]
  results = forked.run([
    ["lm", one, "--workdir=w", "--config.train.steps=2",
     "--config.eval.batches=1"],
    [*MQAR, one, "--table=t.md"],
    [*MQAR, one, "--seeds=2"],
    [*niah, "--depths=0,100"],
    [*niah, "--depths=0,drawn"],
    [*niah, "--depths=drawn"],
    ["tasks", "--task=list"],
    ["tasks", "--task=niah_single_1", one, "--lengths=500", "--new_tokens=8",
     "--depths=50", "--samples=2", "--folder=n", *SIZES],
    # Mistakes.
    ["tasks"],
    ["tasks", "--task=niah_singel_1"],
    ["tasks", "--task=niah_single_1"],
    ["tasks", "--task=niah_single_1", "--workdir=no"],
    [*niah, one],
    [*niah, "--steps=5"],
    [*niah, "--lengths=200"],
    [*niah, "--haystack=w/config.json"],
    [*niah, "--task=niah_single_2", "--haystack=no.txt"],
    [*niah, "--task=niah_multivalue", "--depths=50"],
    [*niah, "--seeds=2"],
    [*MQAR, one, "--workdir=w"],
    [*MQAR, one, "--lengths=31"],
    [*MQAR, one, "--config.train.steps=3"],
    ["tasks", "--task=aa", "--pairs=4"],
    [*MQAR, one, "--steps=0"],
    [*MQAR, one, "--batch_size=65"],
  ], tmp_path)  # fmt: skip
  wrong = [4, *range(8, len(results))]
  for i, done in enumerate(results):
    assert done.returncode == (1 if i in wrong else 0), (i, done.stderr)
    assert "Traceback" not in done.stderr
  assert "transformer_tiny:smoke" in (tmp_path / "t.md").read_text()
  trials = sorted((tmp_path / "r" / "mqar").glob("*.json"))
  assert len(trials) == 2
  # The first seed was there: only the second one was run.
  assert results[2].stderr.count("seed 1:") == 1
  assert "seed 0:" not in results[2].stderr
  found = json.loads(trials[0].read_text())
  assert [h["step"] for h in found["history"]] == [2, 4]
  assert found["protocol"]["vocab_size"] == 64
  (picture,) = (tmp_path / "w" / "tasks").glob("*.png")
  assert picture.read_bytes().startswith(b"\x89PNG")
  result = json.loads(picture.with_suffix(".json").read_text())
  # One file: the second command continued it.
  assert [(c["length"], c["depth"]) for c in result["cells"]] == [
    (600, 0), (600, 100), (600, None),
  ]  # fmt: skip
  assert result["about"]["model"]["step"] == 2
  assert "| 600 | 100 % |" in results[3].stdout
  assert "| 600 | drawn |" in results[5].stdout
  assert "needles: niah_single_1, " in results[6].stdout
  assert "answers right 0.0 %" in results[7].stderr
  assert "| 500 | 50 % |" in results[7].stdout
  said = [results[i].stderr.strip().splitlines()[-1] for i in wrong]
  for line, words in zip(said, (
    "--depths takes numbers with commas between, got '0,drawn'",
    "--task is required. Known: niah_single_1, ",
    "no task 'niah_singel_1'. Did you mean niah_single_1",
    "--workdir is required: the folder of a trained run",
    "no folder no: give the --workdir of a run",
    "or --config, of a model that learns this task alone",
    "--task=niah_single_1 does not take --steps, of models that are trained",
    "niah_single_1 does not fit into 200 tokens: its smallest question has",
    "--haystack is not read by niah_single_1, whose haystack is noise",
    "no file --haystack=no.txt",
    "niah_multivalue asks for 4 values, each at a depth of its own",
    "--task=niah_single_1 does not take --seeds, of recall and languages",
    "--task=mqar does not take --workdir, of needles",
    "needs an even length of at least 16 tokens, got 31",
    "--config.train.steps is decided by the task",
    "--task=aa does not take --pairs, of other tasks",
    "--steps must be at least 1, got 0",
    "a batch of 65 rows needs as many to learn from, got 64",
  ), strict=True):  # fmt: skip
    assert words in line, line
