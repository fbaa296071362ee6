"""Table 1 as a command, stored results as a table, tasks while training."""

import json
import os
import shutil

import jax
import pytest

from nl_jax.eval import evaluate
from tests.eval import documents
from tests.experiments import forked

SMOKE = ["--config.train.steps=2", "--config.eval.batches=1"]
SMOKE.append(f"--compilation_cache={os.environ['NL_TEST_CACHE']}")
TRAIN = ["lm", "--config=transformer_tiny:smoke", *SMOKE]
SCORE = ["table1", "--workdir=t", "--batch_tokens=4096"]
needs_seqio = pytest.mark.skipif(
  not evaluate.has_seqio(),
  reason="seqio is not installed: pip install -e .[eval]",
)


def last(done):
  return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A trained run `t`, and the invented documents in `data`."""
  place = tmp_path_factory.mktemp("table1")
  documents.write(place / "data")
  train = [*TRAIN, "--workdir=t", "--config.checkpoint.every=1"]
  (done,) = forked.run([train], place)
  assert done.returncode == 0, done.stderr
  return place


@needs_seqio
def test_the_table_of_a_run(folder):
  results = forked.run([
    [*SCORE, "--data_dir=data", "--save_samples", "--wiki_max_length=64,32"],
    [*SCORE, "--data_dir=data", "--wiki_max_length=64,32"],
    [*SCORE, "--data_dir=data", "--limit=1"],
    ["tables", "--results=t"],
  ], folder)  # fmt: skip
  scored, again, other, rendered = results
  assert scored.returncode == 0, scored.stderr
  result = json.loads((folder / "t" / "table1_2.json").read_text())
  assert result["protocol"]["wiki_max_length"] == [64, 32]
  assert {*result["tasks"]} == {*documents.DOCS, "wikitext_32"}
  piqa = result["tasks"]["piqa"]
  assert piqa["n_docs"] == 3 and piqa["n_docs_expected"] == 1838
  assert piqa["metrics"]["acc"]["stderr"] is not None
  assert result["run"]["versions"]["seqio"] and result["run"]["command"]
  assert result["table_row"]["avg"] is None
  assert result["reference"]["model"] == "Transformer++"
  assert result["reference"]["differences"]["piqa_acc"] == pytest.approx(
    100 * piqa["metrics"]["acc"]["value"] - 62.98, abs=0.01
  )
  for task in documents.DOCS:
    lines = (folder / "t" / "samples" / f"{task}.jsonl").read_text()
    assert len(lines.splitlines()) == len(documents.DOCS[task])
    assert f"{task}: " in scored.stderr
  table = scored.stdout.splitlines()
  assert table[1].startswith("t, step 2, 1.02k tokens") and "‡" in table[1]
  assert table[2].startswith("± standard error")
  assert "Transformer++ 340M" in table[3] and table[4].startswith("difference")
  # The same command again only shows what was scored.
  assert again.returncode == 0, again.stderr
  assert again.stderr.count("was scored before") == 10
  assert again.stdout.splitlines()[:4] == table[:4]
  assert other.returncode == 1
  assert "holds a result of other weights or settings" in last(other)
  assert rendered.returncode == 0, rendered.stderr
  assert rendered.stdout.startswith("| model | Wiki ppl")


@needs_seqio
def test_random_weights_and_several_checkpoints(folder):
  kept = shutil.ignore_patterns("table1_*", "samples")
  shutil.copytree(folder / "t", folder / "sweep", ignore=kept)
  few = ["--data_dir=data", "--limit=2"]
  random, sweep, drawn = forked.run([
    ["table1", "--config=transformer_tiny:smoke", "--tasks=piqa", *few,
     "--out=r.json"],
    ["table1", "--workdir=sweep", "--step=1,2", "--tasks=boolq", *few,
     "--all=r.json"],
    ["tables", "--results=sweep,r.json", "--plot=sweep.png"],
  ], folder)  # fmt: skip
  assert random.returncode == 0, random.stderr
  assert "random weights" in random.stdout
  made = json.loads((folder / "r.json").read_text())
  assert made["model"]["random_init"] and made["tasks"]["piqa"]["limit"] == 2
  assert sweep.returncode == 0, sweep.stderr
  assert sweep.stdout.count("transformer_tiny:smoke, random weights") == 2
  for step in (1, 2):
    path = folder / "sweep" / f"table1_{step}.json"
    swept = json.loads(path.read_text())
    assert swept["model"]["tokens_trained"] == 512 * step
    assert {*swept["tasks"]} == {"boolq"}
  assert drawn.returncode == 0, drawn.stderr
  assert drawn.stdout.count(" step ") >= 2 and "random" in drawn.stdout
  assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


@needs_seqio
def test_tasks_that_fail_leave_the_others(folder):
  documents.write(
    folder / "part", ["piqa", "winogrande"],
    piqa=[{**documents.DOCS["piqa"][0], "label": -1}],
  )  # fmt: skip
  some = [*SCORE, "--data_dir=part", "--tasks=piqa,boolq,winogrande"]
  none = [*SCORE, "--data_dir=part", "--tasks=piqa,boolq", "--out=n.json"]
  long = [*SCORE, "--data_dir=data", "--tasks=piqa", "--max_length=9"]
  documents.write(folder / "whole", ["piqa", "boolq", "winogrande"])
  mended = [*SCORE, "--data_dir=whole", "--tasks=piqa,boolq,winogrande"]
  some, none, long, mended = forked.run(
    [[*some, "--out=s.json"], none, [*long, "--out=l.json"],
     [*mended, "--out=s.json"]], folder
  )  # fmt: skip
  assert (some.returncode, none.returncode, long.returncode) == (3, 1, 1)
  assert "part/piqa.jsonl:1: label=-1 is unlabelled" in some.stderr
  assert "boolq failed: no file boolq.jsonl in part" in some.stdout
  assert "piqa failed: part/piqa.jsonl:1: label=-1" in some.stdout
  # Fixed, only what failed is scored.
  assert mended.returncode == 0, mended.stderr
  assert "winogrande: was scored before" in mended.stderr
  tasks = json.loads((folder / "s.json").read_text())["tasks"]
  assert {*tasks} == {"winogrande", "piqa", "boolq"}
  assert all("error" not in task for task in tasks.values())
  assert "data/piqa.jsonl:1: the continuation has 23 tokens, more than " in (
    long.stderr
  )
  assert all("Traceback" not in x.stderr for x in (some, none, long, mended))


def test_mistakes_are_one_sentence(folder):
  (folder / "other.json").write_text("{}")
  commands = {
    "give --workdir, the folder of a trained run, or --config": ["table1"],
    "no folder --data_dir=nowhere": [*SCORE, "--data_dir=nowhere"],
    "no task 'pica'; known: wikitext": [
      *SCORE, "--data_dir=data", "--tasks=pica"
    ],
    "--results is required": ["tables"],
    "no result file none.json": ["tables", "--results=none.json"],
    "other.json is not a result of": ["tables", "--results=other.json"],
    "no results (table1_*.json) in data": ["tables", "--results=data"],
    "eval.tasks: no task 'pica'": [
      *TRAIN, "--workdir=new", "--config.eval.tasks=pica"
    ],
    "'piqa:0' must be a task or task:documents": [
      *TRAIN, "--workdir=new", "--config.eval.tasks=piqa:0"
    ],
    "eval.tasks need --data_dir": [
      *TRAIN, "--workdir=new", "--config.eval.tasks=piqa", "--data_dir=no"
    ],
  }  # fmt: skip
  if evaluate.has_seqio():
    commands |= {
      "--step must be a number or latest": [
        *SCORE, "--data_dir=data", "--step=last"
      ],
      "no checkpoint of step 7 in t": [*SCORE, "--data_dir=data", "--step=7"],
      "--wiki_max_length must be whole numbers": [
        *SCORE, "--data_dir=data", "--wiki_max_length=a"
      ],
      "bos=always needs a tokenizer": [
        *SCORE, "--data_dir=data", "--bos=always", "--out=bos.json"
      ],
    }  # fmt: skip
  else:
    commands["pip install -c requirements.txt -e '.[eval]'"] = [
      *SCORE, "--data_dir=data"
    ]  # fmt: skip
  for sentence, done in zip(
    commands, forked.run(list(commands.values()), folder)
  ):
    assert done.returncode == 1, (sentence, done.stderr)
    assert sentence in last(done), last(done)
    assert "Traceback" not in done.stderr
  assert not (folder / "new").exists()


def test_tasks_while_training(folder):
  documents.write(folder / "some", ["piqa", "boolq"])
  (done,) = forked.run([[
    *TRAIN, "--workdir=e", "--config.train.eval_every=1", "--data_dir=some",
    "--config.eval.tasks=('piqa:2','boolq','hellaswag')",
  ]], folder)  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "task hellaswag failed: no file hellaswag.jsonl in some" in done.stderr
  lines = (folder / "e" / "metrics.jsonl").read_text().splitlines()
  scored = [x for x in map(json.loads, lines) if "eval/piqa/acc" in x]
  assert [x["step"] for x in scored] == [1, 2]
  for line in scored:
    assert line["eval/piqa/acc"] in (0, 0.5, 1)
    assert 0 <= line["eval/boolq/acc"] <= 1
    assert line["eval/hellaswag/failed"] == 1
    assert "eval/validation/loss" in line


def test_a_task_that_fails_while_training_is_survived(tmp_path, monkeypatch):
  from experiments.table1 import training
  from nl_jax import sharding
  from nl_jax.data import tokenizers
  from tests.laws.models import MODELS

  documents.write(tmp_path, ["piqa", "boolq"])
  net = MODELS["transformer"]()
  score = training.make(
    {"piqa": 0, "boolq": 1}, str(tmp_path), net, tokenizers.Bytes(),
    sharding.mesh(devices=jax.devices()[:1]), 1024,
  )  # fmt: skip
  params = net.init(jax.random.key(0))
  whole = score(params)
  assert {*whole} == {"eval/piqa/acc", "eval/piqa/acc_norm", "eval/boolq/acc"}
  direct = evaluate.direct

  def fails_once(one, scorer):
    if one.name == "piqa":
      raise RuntimeError("RESOURCE_EXHAUSTED")
    return direct(one, scorer)

  monkeypatch.setattr(evaluate, "direct", fails_once)
  assert score(params) == {
    "eval/piqa/failed": 1.0, "eval/boolq/acc": whole["eval/boolq/acc"]
  }  # fmt: skip
  monkeypatch.undo()
  assert score(params) == whole
