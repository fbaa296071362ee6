"""Table 1: published rows, the average, marks, and what is shown."""

import math

import pytest

from nl_jax.eval import report, requests, table
from nl_jax.models import lm
from tests import test_imports


def result(arch="hope", parameters=10**6, version="neurips", **tasks):
  """A result with every task complete and exact, but for what is given."""
  made = {}
  for number, (name, task) in enumerate(requests.TASKS.items()):
    values = {
      metric: {"value": 0.1 * number + 0.05, "stderr": 0.01}
      for metric in ("acc", "acc_norm", "perplexity", "word_perplexity")
    }
    made[name] = {
      "fidelity": "exact", "n_docs": task.docs, "n_truncated": 0,
      "n_docs_expected": task.docs, "metrics": values,
    } | tasks.get(name, {})  # fmt: skip
  return {
    "tasks": made,
    "protocol": dict(
      memorise="none", wiki_max_length=[256], bos="none", max_length=4096,
      state_policy="reset",
    ),
    "model": dict(
      arch=arch, parameters=parameters, random_init=False, config="mine",
      step=300, tokens_trained=614_400, sequence_length=256,
    ),
    "tokenizer": dict(name="bytes", vocab_size=259),
    "reference": dict(version=version),
  }  # fmt: skip


def test_averages_of_all_published_rows():
  rows = table.published()
  assert len(rows) == 36 + 6
  for row in rows:
    mean = sum(row.values[key] for key in table.AVERAGED) / 8
    assert row.values[table.AVERAGE] == pytest.approx(mean, abs=0.006)


def test_columns_are_the_shown_metrics():
  shown = [(c.task, c.metric) for c in table.COLUMNS]
  assert shown == [
    (name, metric) for name, task in requests.TASKS.items()
    for metric in task.shown
  ]  # fmt: skip


def test_the_average_and_its_error():
  row = table.row(result())
  assert row["complete"] and row["marks"] == {}
  accuracies = [row[key] for key in table.AVERAGED]
  assert row["avg"] == pytest.approx(sum(accuracies) / 8, abs=0.01)
  average = table.cells(result())["avg"]
  assert average.stderr == pytest.approx(math.sqrt(8) / 8)
  assert row["wiki_ppl"] == 0.05 and row["lmb_acc"] == 15.0


@pytest.mark.parametrize("task,marks", [
  ({"fidelity": "approximate"}, "†"),
  ({"n_docs": 5}, "‡"),
  ({"fidelity": "approximate", "n_docs": 5}, "†‡"),
])  # fmt: skip
def test_what_cannot_be_compared_is_marked(task, marks):
  made = result(boolq=task)
  row = table.row(made)
  assert row["marks"] == {"boolq_acc": marks}
  assert row["avg"] is None and not row["complete"]
  assert report.ours(made).cells["boolq_acc"] == f"85.00{marks}"
  assert all(any(x.startswith(m) for x in report.footer(made)) for m in marks)


def test_pages_of_another_window_do_not_stop_the_average():
  assert table.row(result(wikitext={"n_docs": 5}))["avg"] is not None
  assert not table.row(result(wikitext={"n_docs": 5}))["complete"]


def test_memorising_is_marked():
  made = result()
  made["protocol"]["memorise"] = "prompt"
  assert set(table.row(made)["marks"].values()) == {"§"}


def test_a_failed_task_is_an_empty_cell():
  made = result()
  made["tasks"]["piqa"] = {"error": "no file", "metrics": {}}
  row = table.row(made)
  assert row["piqa_acc"] is None and row["avg"] is None
  shown = report.text(report.lines(made))
  assert shown.splitlines()[1].split().count("--") == 2
  assert "piqa failed: no file" in report.footer(made)


@pytest.mark.parametrize("arch,parameters,version,name", [
  ("hope", 10**6, "neurips", "HOPE (ours) 340M/15B [neurips_camera_ready]"),
  ("hope", 800 * 10**6, "neurips", "HOPE (ours) 760M/30B"),
  ("hope", 10**6, "arxiv", "Hope 760M/30B [arxiv_2512.24695v1]"),
  ("hope", 2 * 10**9, "arxiv", "Hope 1.3B/100B"),
  ("titans_lmm", 76 * 10**7, "neurips", "Titans (LMM) 760M/30B [neurips"),
  ("titans_lmm", 34 * 10**7, "neurips", "Titans (LMM) 340M/15B [titans_"),
  ("ttt_mlp", 13 * 10**8, "arxiv", "TTT 1.3B/100B [arxiv"),
  ("rwkv7", 76 * 10**7, "arxiv", "RWKV-7 760M/30B [arxiv"),
  ("memora", 13 * 10**8, "arxiv", "Miras (Memora) 1.3B/100B [arxiv"),
  ("dla", 10**6, "arxiv", "DLA 760M/30B [arxiv"),
])  # fmt: skip
def test_the_published_row_beside(arch, parameters, version, name):
  made = result(arch, parameters, version)
  lines = report.lines(made)
  assert lines[2].name.startswith(name)
  assert lines[3].name == "difference"
  away = float(lines[3].cells["piqa_acc"])
  assert away == pytest.approx(25 - float(lines[2].cells["piqa_acc"]))
  sizes = {line.name.split("/")[0].split()[-1] for line in lines[4:]}
  assert len(sizes) == 1  # The baselines of the same size.


def test_every_printed_model_is_one_of_ours():
  """But for Titans' own table, all of whose rows are baselines."""
  names = {name for names in table._MODELS.values() for name in names}
  printed = {row.model for row in table.published()}
  assert names <= printed and printed - names == {"Gated DeltaNet"}
  assert set(table._MODELS) <= set(lm.MIXERS)


@pytest.mark.parametrize("arch", ["titans_mac", "titans_mag", "titans_mal"])
def test_titans_with_attention_are_not_the_printed_ones(arch):
  made = result(arch, 13 * 10**8, "arxiv")
  assert "no published row of this model" in report.footer(made)


def test_no_published_row():
  made = result("gated_deltanet", version="arxiv")
  assert "difference" not in [line.name for line in report.lines(made)]
  assert "no published row of this model" in report.footer(made)
  assert len(report.lines(result(version="none"))) == 2
  with pytest.raises(ValueError, match="reference must be one of"):
    table.reference("hope", 1, "acl")


def test_markdown_has_a_cell_a_column():
  lines = report.markdown(report.lines(result())).splitlines()
  assert len({line.count("|") for line in lines}) == 1
  assert lines[2].startswith("| mine, step 300, 614k tokens | 0.05 |")


def test_numbers():
  assert report.number(15.113) == "15.11"
  assert report.number(8.68e15) == "8.68e+15"
  assert [report._short(x) for x in (0, 42, 614400, 1.5e10)] == [
    "0", "42", "614k", "15.0B"
  ]  # fmt: skip


def test_all_but_seqios_own_files_do_without_it():
  loaded = test_imports.modules_after(
    "import nl_jax.eval.evaluate, nl_jax.eval.report, nl_jax.eval.table"
  )
  assert not loaded & {"seqio", "tensorflow", "tensorflow_datasets"}
