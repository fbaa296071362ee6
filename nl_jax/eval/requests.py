"""The nine tasks of Table 1: how a document becomes requests.

A request is a context and a continuation whose log-likelihood is asked for.
Strings, order and gold are those of lm-evaluation-harness 0.4.13, zero-shot.
Nothing here needs more than Python.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from nl_jax.eval import wikitext

Doc = Mapping[str, Any]


class Request(NamedTuple):
  """One continuation to be scored.

  Attributes:
    doc_id: number of the document, from 0.
    choice_id: number of the continuation among those of its document.
    num_choices: continuations of the document.
    gold: the right choice.
    norm_len: characters of the choice, without the space before it.
    context: read first.
    continuation: scored.
    line: of the file.
  """

  doc_id: int
  choice_id: int
  num_choices: int
  gold: int
  norm_len: int
  context: str
  continuation: str
  line: int


class Page(NamedTuple):
  """One page, all of which is scored.

  Attributes:
    doc_id: number of the page, from 0.
    text: detokenised.
    words: of the page as it stands in the file.
    bytes: of that.
    line: of the file.
  """

  doc_id: int
  text: str
  words: int
  bytes: int
  line: int


class Choices(NamedTuple):
  """A document as its prompt, one context a choice, and its gold."""

  contexts: Sequence[str]
  choices: Sequence[str]
  gold: int


@dataclasses.dataclass(frozen=True)
class Task:
  """One task of the mixture.

  Attributes:
    name: the harness' name.
    source: data set of Hugging Face, with its config.
    split: that is scored.
    docs: documents of that split.
    columns: that a document must have, and the types of their values.
    choices: document -> Choices; None where whole pages are scored.
    shown: the metrics of Table 1.
    others: documents of the splits that are not scored.
    files: other names of the file, and of samples of it.
  """

  name: str
  source: str
  split: str
  docs: int
  columns: Mapping[str, type | tuple[type, ...]]
  choices: Callable[[Doc], Choices] | None
  shown: tuple[str, ...]
  others: Mapping[str, int] = dataclasses.field(default_factory=dict)
  files: tuple[str, ...] = ()


def of(
  task: Task, docs: Iterable[tuple[int, Doc]], path: Any = "document"
) -> list[Request | Page]:
  """The requests of documents, in order of documents, then of choices.

  Args:
    task: of `TASKS`.
    docs: (line of the file, document).
    path: of the file, for messages.

  Raises:
    ValueError: a document without a label or a needed mark; the sentence
      begins with path and line.
  """
  found: list[Request | Page] = []
  for doc_id, (line, doc) in enumerate(docs):
    if task.choices is None:
      found.append(_page(doc_id, line, doc["page"]))
      continue
    try:
      contexts, choices, gold = task.choices(doc)
    except ValueError as error:
      raise ValueError(f"{path}:{line}: {error}") from error
    found += [
      Request(doc_id, i, len(choices), gold, len(choice), context,
              " " + choice, line)
      for i, (context, choice) in enumerate(zip(contexts, choices))
    ]  # fmt: skip
  return found


def digest(requests: Iterable[Request | Page]) -> str:
  """SHA-256 (hex) of a request stream, as the golden tests have it."""
  hashed = hashlib.sha256()
  for request in requests:
    if isinstance(request, Page):
      text = f"{request.text}\x01"
    else:
      text = f"{request.context}\x00{request.continuation}\x01"
    hashed.update(text.encode("utf-8"))
  return hashed.hexdigest()


def _page(doc_id: int, line: int, page: str) -> Page:
  text = wikitext.detokenise(page)
  return Page(
    doc_id, text, wikitext.words(page), len(page.encode("utf-8")), line
  )


def _gold(doc: Doc, column: str, labels: Sequence[Any]) -> int:
  """The place of a label among those that there are."""
  label = doc[column]
  # True == 1 in Python, and a data set may have either.
  if label in labels:
    return list(labels).index(label)
  known = ", ".join(map(repr, labels))
  what = "unlabelled" if label in ("", -1, "-1", None) else "no label"
  raise ValueError(
    f"{column}={label!r} is {what}, expected one of {known}; give the split "
    "that has labels"
  )


def _texts(values: Sequence[Any]) -> Sequence[str]:
  for value in values:
    if not isinstance(value, str):
      raise ValueError(f"a choice must be a text, got {value!r}")
  return values


def _lambada(doc: Doc) -> Choices:
  *context, last = doc["text"].split(" ")
  if not context:
    raise ValueError(f"text={last!r} has no last word after a space")
  return Choices([" ".join(context)], [last], 0)


def _piqa(doc: Doc) -> Choices:
  context = f"Question: {doc['goal']}\nAnswer:"
  gold = _gold(doc, "label", (0, 1))
  return Choices([context] * 2, [doc["sol1"], doc["sol2"]], gold)


def _hellaswag(doc: Doc) -> Choices:
  said = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
  gold = _gold({"label": str(doc["label"])}, "label", ("0", "1", "2", "3"))
  if len(doc["endings"]) != 4:
    raise ValueError(f"endings has {len(doc['endings'])} entries, expected 4")
  endings = [_without_marks(text) for text in _texts(doc["endings"])]
  return Choices([_without_marks(said)] * 4, endings, gold)


def _without_marks(text: str) -> str:
  """Text without the brackets that WikiHow left; stripped first, not last."""
  text = text.strip().replace(" [title]", ". ")
  return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _winogrande(doc: Doc) -> Choices:
  before, blank, after = doc["sentence"].partition("_")
  if not blank:
    raise ValueError(f"sentence={doc['sentence']!r} has no blank (_)")
  gold = _gold(doc, "answer", ("1", "2"))
  contexts = [before + doc["option1"], before + doc["option2"]]
  return Choices(contexts, [after.strip()] * 2, gold)


def _arc(doc: Doc) -> Choices:
  question: Any = doc["question"]
  choices: Any = doc.get("choices")
  try:
    if isinstance(question, Mapping):  # The files of AI2.
      listed = question["choices"]
      choices = {k: [c[k] for c in listed] for k in ("text", "label")}
      question = question["stem"]
    texts, labels = _texts(choices["text"]), choices["label"]
  except (KeyError, TypeError) as error:
    raise ValueError(
      "no column 'choices' with the lists 'text' and 'label'"
    ) from error
  context = f"Question: {question}\nAnswer:"
  gold = _gold(doc, "answerKey", labels)
  return Choices([context] * len(texts), texts, gold)


def _social_iqa(doc: Doc) -> Choices:
  context = f"Q: {doc['context']} {doc['question']}\nA:"
  gold = _gold({"label": str(doc["label"])}, "label", ("1", "2", "3"))
  answers = [doc[f"answer{letter}"] for letter in "ABC"]
  return Choices([context] * 3, answers, gold)


def _boolq(doc: Doc) -> Choices:
  context = f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"
  return Choices([context] * 2, ["no", "yes"], _gold(doc, "label", (0, 1)))


def _sample(name: str) -> tuple[str, str]:
  return f"hf_schema/{name}", name


_ARC: dict[str, Any] = {
  "source": "allenai/ai2_arc",
  "split": "test",
  "columns": {"question": (str, Mapping), "answerKey": str},
  "choices": _arc,
}
TASKS = {
  task.name: task
  for task in (
    Task(
      "wikitext", "EleutherAI/wikitext_document_level wikitext-2-raw-v1",
      "test", 62, {"page": str}, None, ("word_perplexity",),
      {"train": 629, "validation": 60},
      (*_sample("wikitext2_raw_test_document_level.jsonl"), "wiki.test.raw",
       "wikitext2_raw/wiki.test.raw"),
    ),
    Task(
      "lambada_openai", "EleutherAI/lambada_openai default", "test", 5153,
      {"text": str}, _lambada, ("perplexity", "acc"), {},
      _sample("lambada_openai_test.jsonl"),
    ),
    Task(
      "piqa", "baber/piqa", "validation", 1838,
      {"goal": str, "sol1": str, "sol2": str, "label": int}, _piqa, ("acc",),
      {"train": 16113, "test": 3084},
      (*_sample("piqa_validation.jsonl"), "valid.jsonl"),
    ),
    Task(
      "hellaswag", "Rowan/hellaswag", "validation", 10042,
      {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list,
       "label": (str, int)}, _hellaswag, ("acc_norm",),
      {"train": 39905, "test": 10003},
      _sample("hellaswag_first500_schema.jsonl"),
    ),
    Task(
      "winogrande", "allenai/winogrande winogrande_xl", "validation", 1267,
      {"sentence": str, "option1": str, "option2": str, "answer": str},
      _winogrande, ("acc",), {"train": 40398, "test": 1767},
      _sample("winogrande_xl_validation.jsonl"),
    ),
    Task(
      name="arc_easy", docs=2376, shown=("acc",),
      others={"train": 2251, "validation": 570},
      files=_sample("arc_easy_test.jsonl"), **_ARC,
    ),
    Task(
      name="arc_challenge", docs=1172, shown=("acc_norm",),
      others={"train": 1119, "validation": 299},
      files=_sample("arc_challenge_test.jsonl"), **_ARC,
    ),
    Task(
      "social_iqa", "lighteval/siqa", "validation", 1954,
      {"context": str, "question": str, "answerA": str, "answerB": str,
       "answerC": str, "label": (str, int)}, _social_iqa, ("acc",),
      {"train": 33410}, _sample("social_iqa_validation.jsonl"),
    ),
    Task(
      "boolq", "aps/super_glue boolq", "validation", 3270,
      {"question": str, "passage": str, "label": (int, bool)}, _boolq,
      ("acc",), {"train": 9427, "test": 3245},
      (*_sample("boolq_validation_notitle.jsonl"),
       *_sample("boolq_superglue_first22.jsonl")),
    ),
  )
}  # fmt: skip
