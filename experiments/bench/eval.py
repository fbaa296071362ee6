"""Speed of scoring, and of building the data sets of a full run in seqio.

Scoring is compared with the forward pass of training at equal shapes. The data
sets have the sizes of Table 1 and invented text; they are built in a process of
its own, whose time and memory are of everything: imports, reading, encoding
with a SentencePiece model, seqio.
"""

import json
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_BATCHES = 4
_VOCAB = 4096  # Pieces of the SentencePiece model that is trained here.
# Words of the parts of a document, so that rows have about the tokens of
# the tasks themselves: context, continuation.
_WORDS = {
  "wikitext": (0, 1800),
  "lambada_openai": (28, 1),
  "piqa": (4, 8),
  "hellaswag": (18, 11),
  "winogrande": (6, 2),
  "arc_easy": (10, 2),
  "arc_challenge": (11, 2),
  "social_iqa": (9, 1),
  "boolq": (52, 1),
}


def run(least_seconds: Callable[[Mapping], Mapping[str, float]]) -> list[dict]:
  """Rows {"what", "ratio", "target"}.

  Args:
    least_seconds: of `experiments.bench`.

  Raises:
    ValueError: seqio is not installed.
  """
  from nl_jax.eval import evaluate

  if not evaluate.has_seqio():
    raise ValueError(
      "--suite=eval builds data sets with seqio: run `pip install -c "
      "requirements.txt -e '.[eval]'`"
    )
  rows = [
    _scoring(name, least_seconds) for name in ("transformer_tiny", "hope_tiny")
  ]
  return [*rows, *_building()]


def _scoring(name: str, least_seconds: Callable) -> dict:
  """Scoring some batches against as many forward passes of training."""
  import jax
  import numpy as np

  from experiments.cli import named as named_lib
  from nl_jax import build, sharding
  from nl_jax.eval import scoring
  from nl_jax.train import step as step_lib

  config = build.resolve(named_lib.load_config(name))
  net, mesh = build.model(config), sharding.mesh()
  B, T = config.data.batch_size, config.data.sequence_length
  params = jax.jit(net.init)(jax.random.key(0))
  scorer = scoring.Scorer(net, 259, mesh, batch_tokens=B * T)
  draw = np.random.default_rng(0).integers
  tokens = draw(3, 259, (_BATCHES, B, T + 1)).astype(np.int32)
  pairs = [(row[:-8], row[-8:]) for row in tokens.reshape(-1, T + 1)]
  batches = [
    dict(inputs=x[:, :-1], targets=x[:, 1:], segment_ids=np.ones((B, T), int),
         weights=np.ones((B, T), np.float32))
    for x in tokens
  ]  # fmt: skip

  @jax.jit
  def forward(params: Any, batch: Any) -> Any:
    return step_lib.loss_sum(params, net, batch)[0]

  def training() -> list[Any]:
    return [forward(params, batch) for batch in batches]

  times = least_seconds(
    {"scoring": lambda: scorer(params, pairs), "training": training}
  )
  assert scorer.shapes == {(B, T)}
  return dict(
    what=f"scoring / forward pass of training, {name}, B {B} T {T}",
    ratio=times["scoring"] / times["training"],
    target="<= 1.2",
  )


def _building() -> list[dict]:
  """Seconds and GB of building the data sets of a full run."""
  from nl_jax.data import sources, tokenizer_training

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    texts = list(sources.embedded().train)
    model = folder / "words.model"
    tokenizer_training.train(texts, sum(map(len, texts)), model, _VOCAB)
    words = " ".join(texts).split()
    for task in _WORDS:
      lines = (json.dumps(doc) for doc in _documents(task, words))
      (folder / f"{task}.jsonl").write_text("\n".join(lines))
    done = subprocess.run(
      [sys.executable, "-m", "experiments.bench.eval", name, str(model)],
      capture_output=True, text=True, check=True,
      cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
  found = json.loads(done.stdout)
  size = f"{found['rows']:,} rows, {found['tokens'] / 1e6:.1f}M tokens"
  return [
    dict(
      what=f"data sets of a full run through seqio ({size}), seconds",
      ratio=found["seconds"],
      target="<= 90",
    ),
    dict(
      what="the same, peak memory of the process in GB",
      ratio=found["bytes"] / 1e9,
      target="<= 1.5",
    ),
  ]


def _documents(task: str, words: list[str]) -> Iterator[dict[str, Any]]:
  """Documents of a task, as many as its split has."""
  from nl_jax.eval import requests

  rng = random.Random(task)
  context, answer = _WORDS[task]
  draw = lambda count: " ".join(rng.choices(words, k=count))
  for _ in range(requests.TASKS[task].docs):
    yield _document(task, draw(context), [draw(answer) for _ in range(4)])


def _document(task: str, said: str, answers: list[str]) -> dict[str, Any]:
  """The columns of a document, from its context and up to four answers."""
  match task:
    case "wikitext":
      return {"page": answers[0]}
    case "lambada_openai":
      return {"text": f"{said} {answers[0]}"}
    case "piqa":
      return {"goal": said, "sol1": answers[0], "sol2": answers[1], "label": 0}
    case "hellaswag":
      parts = {"activity_label": "A", "ctx_a": said, "ctx_b": "b"}
      return {**parts, "endings": answers, "label": "0"}
    case "winogrande":
      options = {"option1": "one", "option2": "two", "answer": "1"}
      return {"sentence": f"{said} _ {answers[0]}", **options}
    case "social_iqa":
      named = {f"answer{x}": answer for x, answer in zip("ABC", answers)}
      return {"context": said, "question": "why?", "label": "1", **named}
    case "boolq":
      return {"passage": f"T -- {said}", "question": "is it so", "label": 1}
    case _:
      choices = {"text": answers, "label": list("ABCD")}
      return {"question": said, "choices": choices, "answerKey": "A"}


def _build(folder: str, model: str) -> dict[str, float]:
  """Builds all data sets, and scores every row as nothing."""
  begin = time.perf_counter()
  from nl_jax.data import tokenizers
  from nl_jax.eval import encoding, evaluate, requests, scoring, special

  tokenizer = tokenizers.load(model)
  prefix = special.ids(tokenizer).prefix
  protocol = encoding.Protocol(4096, 4096, prefix)
  prepared = [
    evaluate.prepare(name, pathlib.Path(folder), tokenizer, protocol)
    for name in requests.TASKS
  ]
  through = evaluate.through_seqio(prepared, tokenizer)
  nothing = lambda pairs: scoring.Scores(
    [-1.0] * len(pairs), [False] * len(pairs)
  )
  for one in prepared:
    through(one, nothing)
  rows = [row for one in prepared for row in one.rows.rows]
  unit = 1 if sys.platform == "darwin" else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return {
    "seconds": time.perf_counter() - begin,
    "bytes": peak,
    "rows": len(rows),
    "tokens": sum(len(row.inputs) + len(row.targets) for row in rows),
  }


if __name__ == "__main__":
  print(json.dumps(_build(*sys.argv[1:])))
