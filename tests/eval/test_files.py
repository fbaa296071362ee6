"""The data folder: other forms of a file, and mistakes in one."""

import json

import pytest

from nl_jax.data import tokenizers
from nl_jax.eval import encoding, evaluate, files, requests
from tests.eval import documents


def load(task, folder, limit=0):
  return files.load(requests.TASKS[task], folder, limit)


def asked(task, folder):
  loaded = load(task, folder)
  return requests.of(requests.TASKS[task], loaded.docs, loaded.path)


def changed(task, **values):
  """The invented documents of a task, the second one with other values."""
  first, second, *rest = documents.DOCS[task]
  return {task: [first, {**second, **values}, *rest]}


def test_other_forms_give_the_same_requests(tmp_path):
  plain = documents.write(tmp_path / "plain")
  other = tmp_path / "other"
  documents.write(
    other,
    ["hellaswag", "social_iqa", "boolq", "arc_easy"],
    hellaswag=[{**d, "label": int(d["label"])} | {"split": "validation"}
               for d in documents.DOCS["hellaswag"]],
    social_iqa=[{**d, "label": int(d["label"])}
                for d in documents.DOCS["social_iqa"]],
    boolq=[{**d, "label": bool(d["label"])} for d in documents.DOCS["boolq"]],
    arc_easy=[
      {"question": {"stem": d["question"], "choices": [
        {"text": text, "label": label}
        for text, label in zip(d["choices"]["text"], d["choices"]["label"])
      ]}, "answerKey": d["answerKey"]}
      for d in documents.DOCS["arc_easy"]
    ],
  )  # fmt: skip
  rows, labels = [], []
  for doc in documents.DOCS["piqa"]:
    rows.append(json.dumps({k: v for k, v in doc.items() if k != "label"}))
    labels.append(str(doc["label"]))
  (other / "valid.jsonl").write_text("\n".join(rows))
  (other / "valid-labels.lst").write_text("\n".join(labels) + "\n")
  pages = [d["page"] for d in documents.DOCS["wikitext"]]
  (other / "wiki.test.raw").write_text("\n".join([" ", *pages]))
  for task in ("hellaswag", "social_iqa", "boolq", "arc_easy", "piqa"):
    assert asked(task, other) == asked(task, plain), task
  raw = asked("wikitext", other)
  assert [r.words for r in raw] == [r.words for r in asked("wikitext", plain)]


def test_blank_lines_and_more_columns_are_no_documents(tmp_path):
  documents.write(tmp_path, ["piqa"])
  path = tmp_path / "piqa.jsonl"
  path.write_text("\n" + path.read_text().replace("\n", "\n\n"))
  loaded = load("piqa", tmp_path)
  assert loaded.n_docs == 3 and [line for line, _ in loaded.docs] == [2, 4, 6]
  assert loaded.fidelity == files.USER
  assert "has 3 documents" in loaded.warnings[0]
  assert len(load("piqa", tmp_path, limit=2).docs) == 2


def test_the_first_name_wins(tmp_path):
  documents.write(tmp_path, ["boolq"])
  (tmp_path / "boolq.jsonl").rename(tmp_path / "boolq_superglue_first22.jsonl")
  assert load("boolq", tmp_path).path.name == "boolq_superglue_first22.jsonl"
  documents.write(tmp_path, ["boolq"])
  assert load("boolq", tmp_path).path.name == "boolq.jsonl"


def test_passages_without_titles_are_told(tmp_path):
  documents.write(tmp_path, ["boolq"], **changed("boolq", passage="No title"))
  assert "only 2 of 3 passages" in load("boolq", tmp_path).warnings[-1]


@pytest.mark.parametrize("task,values,sentence", [
  ("piqa", {"label": -1}, "label=-1 is unlabelled, expected one of 0, 1"),
  ("piqa", {"label": None}, "unlabelled"),
  ("piqa", {"goal": 3}, "'goal' is 3, of type int"),
  ("hellaswag", {"label": ""}, "label='' is unlabelled"),
  ("hellaswag", {"split": "test"}, "a document of the split 'test'; hellaswag"
   " is scored on the validation split"),
  ("hellaswag", {"endings": ["a"]}, "endings has 1 entries, expected 4"),
  ("hellaswag", {"endings": ["a", "b", 3, "d"]}, "must be a text, got 3"),
  ("piqa", {"goal": None}, "'goal' is None, of type NoneType"),
  ("winogrande", {"answer": ""}, "unlabelled"),
  ("winogrande", {"sentence": "none here"}, "has no blank"),
  ("arc_easy", {"answerKey": "Z"}, "answerKey='Z' is no label"),
  ("arc_easy", {"choices": 3}, "no column 'choices'"),
  ("social_iqa", {"label": "4"}, "label='4' is no label"),
  ("boolq", {"label": -1}, "unlabelled"),
  ("lambada_openai", {"text": "word"}, "no last word after a space"),
])  # fmt: skip
def test_a_mistake_names_file_and_line(task, values, sentence, tmp_path):
  documents.write(tmp_path, [task], **changed(task, **values))
  with pytest.raises(ValueError) as error:
    asked(task, tmp_path)
  text = str(error.value)
  assert text.startswith(f"{tmp_path / task}.jsonl:2: "), text
  assert sentence in text and "\n" not in text


@pytest.mark.parametrize("task", list(requests.TASKS))
def test_a_missing_column_or_file_is_named(task, tmp_path):
  column = next(iter(requests.TASKS[task].columns))
  docs = [dict(doc) for doc in documents.DOCS[task]]
  del docs[1][column]
  documents.write(tmp_path, [task], **{task: docs})
  with pytest.raises(ValueError, match=f":2: no column '{column}'; {task}"):
    load(task, tmp_path)
  path = tmp_path / f"{task}.jsonl"
  path.rename(tmp_path / f"{task}_train.jsonl")
  with pytest.raises(FileNotFoundError, match=f"there is {task}_train.jsonl"):
    load(task, tmp_path)


@pytest.mark.parametrize("content,sentence", [
  (b'{"text": "a b"}\n{"text": \n', "lambada_openai.jsonl:2: not JSON"),
  (b'{"text": "a b"}\n[1]\n', ":2: expected a JSON object, got list"),
  (b'{"text": "a b"}\n{"text": "\xe9"}\n', ":2: not UTF-8"),
  (b"", "has no documents"),
])  # fmt: skip
def test_a_broken_file_is_one_sentence(content, sentence, tmp_path):
  (tmp_path / "lambada_openai.jsonl").write_bytes(content)
  with pytest.raises(ValueError, match=sentence):
    load("lambada_openai", tmp_path)


def test_the_size_of_another_split_is_recognised(tmp_path):
  doc = documents.DOCS["arc_challenge"][0]
  documents.write(tmp_path, ["arc_challenge"], arc_challenge=[doc] * 299)
  with pytest.raises(ValueError, match="299 documents, as the validation"):
    load("arc_challenge", tmp_path)


def test_pages_without_text_are_told(tmp_path):
  documents.write(tmp_path, ["wikitext"], wikitext=[{"page": ""}])
  protocol = encoding.Protocol(8, 8, prefix_id=1)
  with pytest.raises(ValueError, match="wikitext.jsonl has no text to score"):
    evaluate.prepare("wikitext", tmp_path, tokenizers.Bytes(), protocol)
