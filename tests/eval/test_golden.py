"""Requests and metrics against lm-evaluation-harness 0.4.13, bit for bit.

Frozen in tests/golden/lm_eval.json; if the harness is to be followed to another
version, run `python -m tests.golden.lm_eval` there and say so in the commit.
"""

import hashlib
import importlib.metadata
import json
import pathlib

import numpy as np
import pytest

from nl_jax.data import tokenizers
from nl_jax.eval import encoding, evaluate, files, requests, scoring, wikitext
from tests.eval import documents, toy

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lm_eval.json"
FROZEN = json.loads(GOLDEN.read_text(encoding="utf-8"))
TASKS = list(requests.TASKS)


def protocol(length=2048):
  return encoding.Protocol(length, length, prefix_id=1)


def toy_scores(pairs):
  found = [toy.score(*pair) for pair in pairs]
  return scoring.Scores(*map(list, zip(*found)))


def measured(task, folder, length=2048):
  """Our metrics of a folder's file, with the toy model."""
  made = evaluate.prepare(task, folder, tokenizers.Bytes(), protocol(length))
  return evaluate.direct(made, toy_scores)[0]


def assert_as_frozen(metrics, frozen):
  for name, value in frozen.items():
    if name.startswith("acc"):
      assert metrics[name] == value, name
    else:
      np.testing.assert_allclose(metrics[name], value, rtol=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return documents.write(tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("task", TASKS)
def test_requests_are_the_harness(task, folder):
  frozen = FROZEN["invented"][task]
  loaded = files.load(requests.TASKS[task], folder)
  asked = requests.of(requests.TASKS[task], loaded.docs)
  stream = [
    [r.text] if task == "wikitext" else [r.context, r.continuation]
    for r in asked
  ]
  assert stream == frozen["stream"]
  assert requests.digest(asked) == frozen["sha256"]


@pytest.mark.parametrize("task", TASKS)
def test_metrics_are_the_harness(task, folder):
  frozen = FROZEN["invented"][task]
  assert_as_frozen(measured(task, folder), frozen["metrics"])
  if task == "wikitext":
    assert_as_frozen(measured(task, folder, 512), frozen["metrics_512"])


def test_all_sixteen_metrics_are_frozen():
  names = [
    (task, name)
    for task in TASKS
    for name in FROZEN["invented"][task]["metrics"]
  ]
  assert len(names) == 16
  assert FROZEN["lm_eval"] == "0.4.13"


@pytest.mark.parametrize("task", TASKS)
def test_real_files_are_the_harness(task, data_dir):
  """The files of NL_DATA: hashes of all requests, metrics of all documents."""
  frozen = FROZEN["real"][task]
  try:
    loaded = files.load(requests.TASKS[task], data_dir)
  except FileNotFoundError as error:
    pytest.skip(str(error))
  if loaded.sha256 != frozen["file"]:
    pytest.skip(f"{loaded.path} is another file than the frozen one")
  asked = requests.of(requests.TASKS[task], loaded.docs)
  assert len(asked) == frozen["requests"]
  assert requests.digest(asked) == frozen["sha256"]
  assert_as_frozen(measured(task, data_dir), frozen["metrics"])
  if task == "wikitext":
    assert_as_frozen(measured(task, data_dir, 512), frozen["metrics_512"])


def test_the_raw_file_has_the_pages(data_dir):
  path = data_dir / "wikitext2_raw" / "wiki.test.raw"
  if not path.is_file():
    pytest.skip(f"no {path}")
  pages = list(wikitext.pages(path.read_text(encoding="utf-8")))
  docs = [(line, {"page": page}) for line, page in pages]
  asked = requests.of(requests.TASKS["wikitext"], docs)
  assert requests.digest(asked) == FROZEN["real"]["wikitext"]["sha256"]
  assert sum(r.words for r in asked) == 241_335
  assert sum(r.bytes for r in asked) == 1_290_527
  assert sum(len(r.text) for r in asked) == 1_238_432


# acc and acc_norm of a model whose logits are all equal: the fewest tokens win.
CONSTANT = {
  "piqa": (0.534, 0.484),
  "winogrande": (0.496, 0.496),
  "arc_easy": (0.245, 0.266),
  "arc_challenge": (0.192, 0.272),
  "social_iqa": (0.320, None),
  "boolq": (0.378, None),
}


@pytest.mark.parametrize("task", list(CONSTANT))
def test_a_model_without_opinion(task, data_dir):
  """Equal logits over bytes; by its length, up to a tie of floats."""

  def score(pairs):
    lls = [-len(targets) * float(np.log(259)) for _, targets in pairs]
    return scoring.Scores(lls, [False] * len(lls))

  tokenizer = tokenizers.Bytes()
  try:
    made = evaluate.prepare(task, data_dir, tokenizer, protocol(4096))
  except FileNotFoundError as error:
    pytest.skip(str(error))
  if made.loaded.sha256 != FROZEN["real"][task]["file"]:
    pytest.skip(f"{made.loaded.path} is another file than the frozen one")
  metrics, _ = evaluate.direct(made, score)
  for name, value in zip(("acc", "acc_norm"), CONSTANT[task]):
    if name in metrics:
      assert metrics[name] == pytest.approx(value, abs=6e-4 + 1 / 1172)


@pytest.mark.parametrize("task", ["wikitext", "hellaswag"])
def test_a_real_model_scores_the_same_in_the_harness(task, folder, monkeypatch):
  """Live: the harness calls the model row by row, without padding."""
  pytest.importorskip("lm_eval")
  for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    monkeypatch.setenv(name, "1")
  from tests.eval import test_scoring
  from tests.golden import lm_eval as harness

  model, params = test_scoring.made("hope_linear")
  alone = lambda inputs, targets: test_scoring.plain(
    model, params, (np.array(inputs), np.array(targets))
  )
  few = documents.write(folder / "few", [task],
                        **{task: documents.DOCS[task][:1]})  # fmt: skip
  path = few / f"{task}.jsonl"
  theirs = harness.ask(task, path, harness.Model(alone, length=96))
  scorer = scoring.Scorer(model, 259, test_scoring.mesh())
  made = evaluate.prepare(task, few, tokenizers.Bytes(), protocol(96))
  ours, _ = evaluate.direct(made, lambda pairs: scorer(params, pairs))
  for name, value in theirs.items():
    assert ours[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("task", TASKS)
def test_the_harness_itself_agrees(task, folder, monkeypatch):
  """Live, where it is installed, with a model of another shape of scores."""
  pytest.importorskip("lm_eval")
  if importlib.metadata.version("lm_eval") != FROZEN["lm_eval"]:
    pytest.skip(f"lm_eval is not {FROZEN['lm_eval']}")
  for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    monkeypatch.setenv(name, "1")
  from tests.golden import lm_eval as harness

  def drawn(inputs, targets):
    text = np.asarray([*inputs, 0, *targets], np.int32).tobytes()
    draw = int.from_bytes(hashlib.sha256(text).digest()[:6], "big")
    return -draw / 2**44 * len(targets), draw % 3 == 0

  model = harness.Model(drawn, length=96)
  theirs = harness.ask(task, folder / f"{task}.jsonl", model)
  made = evaluate.prepare(task, folder, tokenizers.Bytes(), protocol(96))
  score = lambda pairs: scoring.Scores(
    *map(list, zip(*(drawn(*pair) for pair in pairs)))
  )
  ours, _ = evaluate.direct(made, score)
  assert_as_frozen(ours, theirs)
