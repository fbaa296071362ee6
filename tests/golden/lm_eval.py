"""Makes lm_eval.json: what lm-evaluation-harness 0.4.13 asks and measures.

Of each task: the requests of the invented documents of tests/eval/documents.py
and, where NL_DATA names the folder of real data, the hash of those of its files
by their SHA-256; and the metrics of the toy model of tests/eval/toy.py on both,
at length 2048, WikiText also at 512. The stock definitions are included as they
are; only their data become local files.

Run, where lm_eval==0.4.13 is installed: python -m tests.golden.lm_eval
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile

import lm_eval
import lm_eval.tasks
from lm_eval import utils
from lm_eval.api import model as lm_model

from tests.eval import documents, toy

LENGTH = 2048
STOCK = {
  "wikitext": ("wikitext/wikitext.yaml", "test"),
  "lambada_openai": ("lambada/lambada_openai.yaml", "test"),
  "piqa": ("piqa/piqa.yaml", "validation"),
  "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
  "winogrande": ("winogrande/default.yaml", "validation"),
  "arc_easy": ("arc/arc_easy.yaml", "test"),
  "arc_challenge": ("arc/arc_challenge.yaml", "test"),
  "social_iqa": ("siqa/siqa.yaml", "validation"),
  "boolq": ("super_glue/boolq/default.yaml", "validation"),
}
REAL = {
  "wikitext": "wikitext2_raw_test_document_level.jsonl",
  "lambada_openai": "lambada_openai_test.jsonl",
  "piqa": "piqa_validation.jsonl",
  "hellaswag": "hellaswag_first500_schema.jsonl",
  "winogrande": "winogrande_xl_validation.jsonl",
  "arc_easy": "arc_easy_test.jsonl",
  "arc_challenge": "arc_challenge_test.jsonl",
  "social_iqa": "social_iqa_validation.jsonl",
  "boolq": "boolq_validation_notitle.jsonl",
}


class Model(lm_model.TemplateLM):
  """What the harness asks; a function scores it, bytes are its tokens."""

  backend = "causal"
  eot_token_id = prefix_token_id = 1
  tokenizer_name = "bytes"

  def __init__(self, score=toy.score, length: int = LENGTH):
    super().__init__()
    self._score, self.max_length = score, length
    self.stream: list[tuple[str, str]] = []  # Requests, in their order.

  def tok_encode(self, string, add_special_tokens=None, **kwargs):
    return [byte + 3 for byte in string.encode("utf-8")]

  def _loglikelihood_tokens(self, requests, **kwargs):
    self.stream += [texts for texts, _, _ in requests]
    return [
      self._score((before + after)[-self.max_length - 1 :][: -len(after)],
                  after)
      for _, before, after in requests
    ]  # fmt: skip

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    found = []
    for request in requests:
      (page,) = request.args
      self.stream.append((page,))
      cut = utils.get_rolling_token_windows(
        self.tok_encode(page), self.prefix_token_id, self.max_length, 1
      )
      found.append(sum(self._window(*pair) for pair in cut))
    return found

  def _window(self, inputs: list[int], targets: list[int]) -> float:
    """A window's inputs overlap its targets by all but one."""
    context = inputs[: len(inputs) - len(targets) + 1]
    return self._score(context, targets)[0]

  def generate_until(self, requests, disable_tqdm=False):
    raise NotImplementedError


def ask(task: str, path: pathlib.Path, model: Model) -> dict[str, float]:
  """The harness' metrics of a task on a file; the model keeps the requests."""
  stock = pathlib.Path(lm_eval.tasks.__file__).parent / STOCK[task][0]
  splits = dict.fromkeys(("training", "validation", "test", "fewshot"), "null")
  splits[STOCK[task][1]] = "eval"
  lines = [
    f"include: {stock}",
    f"task: local_{task}",
    "dataset_path: json",
    "dataset_name: null",
    *(f"{name}_split: {split}" for name, split in splits.items()),
    f"dataset_kwargs: {{data_files: {{eval: {path}}}}}",
  ]
  with tempfile.TemporaryDirectory() as folder:
    text = "\n".join(lines)
    (pathlib.Path(folder) / f"local_{task}.yaml").write_text(text)
    manager = lm_eval.tasks.TaskManager(
      include_path=folder, include_defaults=False
    )
    found = lm_eval.simple_evaluate(
      model=model, tasks=[f"local_{task}"], num_fewshot=0,
      task_manager=manager, bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
  return {
    key.removesuffix(",none"): value
    for key, value in found["results"][f"local_{task}"].items()
    if key.endswith(",none") and "stderr" not in key
  }


def digest(stream: list[tuple[str, ...]]) -> str:
  text = "".join("\x00".join(request) + "\x01" for request in stream)
  return hashlib.sha256(text.encode("utf-8")).hexdigest()


def measured(task: str, path: pathlib.Path, keep: bool = False) -> dict:
  """Requests, themselves or their hash alone, and metrics of a file."""
  model = Model()
  metrics = ask(task, path, model)
  found = {
    "requests": len(model.stream),
    "sha256": digest(model.stream),
    "metrics": metrics,
  } | ({"stream": model.stream} if keep else {})
  if task == "wikitext":
    found["metrics_512"] = ask(task, path, Model(length=512))
  return found


def main() -> None:
  out = {"lm_eval": importlib.metadata.version("lm_eval")}
  invented, real = {}, {}
  with tempfile.TemporaryDirectory() as name:
    folder = documents.write(pathlib.Path(name))
    for task in STOCK:
      invented[task] = measured(task, folder / f"{task}.jsonl", keep=True)
  where = os.environ.get("NL_DATA")
  for task, name in REAL.items() if where else ():
    path = pathlib.Path(where) / "hf_schema" / name
    of_file = {"file": hashlib.sha256(path.read_bytes()).hexdigest()}
    real[task] = of_file | measured(task, path)
  out |= {"invented": invented, "real": real}
  path = pathlib.Path(__file__).with_suffix(".json")
  path.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
