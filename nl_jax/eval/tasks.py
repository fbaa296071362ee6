"""The tasks and the mixture `nl_table1` in seqio; needs the extra `eval`.

Rows are made before seqio sees them (`encoding`), so that a mistake in a file
is a sentence with its line and not an error of a TensorFlow graph, and so that
the same rows are scored where seqio is not installed.
"""

import logging as std_logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from nl_jax import debugging

# Before TensorFlow is imported: it tells of every library that is not here.
if not debugging.on():
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402

from nl_jax.eval import (  # noqa: E402
  converter,
  encoding,
  metrics,
  scoring,
  vocabulary,
)

MIXTURE = "nl_table1"
SPLIT = "eval"  # Of all tasks: seqio skips a task without the split.
_PREFIX = "nl_"
VERSIONS = {"seqio": seqio.__version__, "tensorflow": tf.__version__}

# The accelerator is JAX's.
tf.config.set_visible_devices([], "GPU")


def name(task: str) -> str:
  """How a task is registered: nl_<task>."""
  return f"{_PREFIX}{task}"


def register(
  rows: Mapping[str, Sequence[encoding.Row]],
  tokenizer: Any,
  mixed: Sequence[str],
) -> None:
  """Registers tasks and their mixture; earlier ones of the names are replaced.

  Args:
    rows: of each task, by its name; wikitext_<window> is wikitext at another
      window.
    tokenizer: of `nl_jax.data.tokenizers`.
    mixed: tasks of the mixture `nl_table1`.
  """
  remove()
  feature = seqio.Feature(
    vocabulary.Vocabulary(tokenizer), add_eos=False, dtype=tf.int32
  )
  for task, made in rows.items():
    seqio.TaskRegistry.add(
      name(task),
      source=seqio.FunctionDataSource(_dataset_fn(made), splits=[SPLIT]),
      preprocessors=[],
      output_features={"inputs": feature, "targets": feature},
      postprocess_fn=_about,
      metric_fns=[metrics.of(task)],
    )
  if mixed:
    names = [name(task) for task in mixed]
    # Evaluation ignores the rates.
    seqio.MixtureRegistry.add(MIXTURE, names, default_rate=1.0)


def remove() -> None:
  """Removes what `register` registered."""
  for registry in (seqio.MixtureRegistry, seqio.TaskRegistry):
    for known in list(registry.names()):
      if known.startswith(_PREFIX):
        registry.remove(known)


def evaluate(
  registered: str, max_length: int, score: Any
) -> dict[str, tuple[dict[str, float], scoring.Scores]]:
  """Scores a task or the mixture through seqio's evaluator.

  Args:
    registered: name of a task or mixture.
    max_length: tokens of the longest row.
    score: pairs (inputs, targets) -> Scores.

  Returns:
    Metrics and scores by the registered name of each task.

  Raises:
    RuntimeError: TensorFlow failed, or seqio left a task out.
  """
  # It tells of lengths and loggers that are meant to be as they are.
  std_logging.getLogger("absl").addFilter(_quiet)
  wanted = seqio.get_subtasks(seqio.get_mixture_or_task(registered))
  try:
    evaluator = seqio.Evaluator(
      registered,
      converter.ScoringFeatureConverter(max_length),
      eval_split=SPLIT,
      sequence_length=None,
      async_compute_metrics=False,
    )
    future, outputs = evaluator.evaluate(
      compute_metrics=True, score_fn=lambda ds: _score(ds, score)
    )
  except tf.errors.OpError as error:
    first = str(error).strip().splitlines()[0]
    raise RuntimeError(f"TensorFlow: {first}") from error
  finally:
    std_logging.getLogger("absl").removeFilter(_quiet)
  found = future.result()
  missing = {task.name for task in wanted} - {*found}
  if missing:
    raise RuntimeError(f"seqio left out {', '.join(sorted(missing))}")
  return {
    task: (values, _scores(outputs[task])) for task, values in found.items()
  }


def _quiet(record: std_logging.LogRecord) -> bool:
  """Whether a line is worth showing: none of seqio's is."""
  return "seqio" not in record.pathname


def _score(
  ds: tf.data.Dataset, score: Any
) -> tuple[list[tuple[int, float]], dict[str, list[bool]]]:
  """The evaluator's score_fn: padding is stripped by the weights alone."""
  numbers, pairs = [], []
  for number, row in ds.as_numpy_iterator():
    (asked,) = np.nonzero(row["decoder_loss_weights"])
    first, end = asked[0], asked[-1] + 1
    labels = row["decoder_target_tokens"]
    # The first token is an input only, the rest are labels too.
    tokens = np.append(row["decoder_input_tokens"][:1], labels[:end])
    numbers.append(int(number))
    pairs.append((tokens[: first + 1], tokens[first + 1 :]))
  scores = score(pairs)
  # A list: seqio puts lists, and nothing else, into the order of the rows.
  return list(zip(numbers, scores.lls)), {"is_greedy": scores.is_greedy}


def _scores(output: Mapping[Any, Any]) -> scoring.Scores:
  (found,) = output.values()
  lls, aux = found
  return scoring.Scores(list(lls), list(aux["is_greedy"]))


def _about(
  target: str, example: Mapping[str, Any], is_target: bool
) -> dict[str, int]:
  """What the metrics are given of a row: its integers."""
  del target, is_target
  return {key: int(x) for key, x in example.items() if np.ndim(x) == 0
          and key != "targets_pretokenized"}  # fmt: skip


def _dataset_fn(rows: Sequence[encoding.Row]) -> Any:
  """A function that yields the rows, one a time, from flat arrays."""
  tokens = {
    key: (np.concatenate(xs), np.cumsum([0, *map(len, xs)]))
    for key, xs in (
      ("inputs", [row.inputs for row in rows]),
      ("targets", [row.targets for row in rows]),
    )
  }
  about = {
    key: np.array([row.about[key] for row in rows]) for key in rows[0].about
  }
  about["targets_pretokenized"] = np.array(
    [row.text.encode("utf-8") for row in rows], object
  )

  def dataset_fn(
    split: str, shuffle_files: bool, seed: int | None = None
  ) -> tf.data.Dataset:
    del split, shuffle_files, seed  # The rows are there, in their order.
    flat = {key: (tf.constant(x), tf.constant(at))
            for key, (x, at) in tokens.items()}  # fmt: skip

    def row(i: tf.Tensor, values: dict[str, tf.Tensor]) -> dict[str, Any]:
      cut = {key: x[at[i] : at[i + 1]] for key, (x, at) in flat.items()}
      return {**cut, **values}

    return tf.data.Dataset.from_tensor_slices(about).enumerate().map(row)

  return dataset_fn
