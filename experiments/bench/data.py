"""Speed of preparing a corpus and of reading it while training.

The text is the embedded corpus (sources of Python's library) until there are
8 MB of it; one process, so figures are of one core. Times are the least of
several turns.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

_BYTES = 2**23
_ROUNDS = 3
_STEPS = 20
_VOCAB = 4096  # Pieces of the SentencePiece model that is trained here.


def run(
  step: Callable[[], Any], sequence_length: int, batch: int
) -> list[dict]:
  """Rows {"what", "ratio", "target"}.

  Args:
    step: one train step of the tiny model, without its data.
    sequence_length: of its rows.
    batch: rows of a step.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    texts = _write(folder / "corpus.txt")
    model = folder / "words.model"
    _train(texts, model)
    prepare = lambda *args: _seconds_of_job(folder, sequence_length, *args)
    seconds, _ = prepare("bytes")
    rows = [
      dict(
        what="prepare, bytes: MB of text a second on one core",
        ratio=_BYTES / 1e6 / seconds,
        target=">= 5",
      )
    ]
    seconds, alone = prepare(str(model))
    rows.append(
      dict(
        what="prepare, SentencePiece / its encoding alone",
        ratio=seconds / alone,
        target="<= 1.3",
      )
    )
    wait = _waiting(folder, step, sequence_length, batch)
  rows.append(
    dict(
      what="train step, hope_tiny: share spent waiting for prepared data",
      ratio=wait,
      target="<= 0.02",
    )
  )
  return rows


def _write(path: pathlib.Path) -> list[str]:
  """Writes the text; returns its documents."""
  from nl_jax.data import sources

  texts = list(sources.embedded().train)
  content = "\n".join(texts).encode("utf-8")
  path.write_bytes((content * (_BYTES // len(content) + 1))[:_BYTES])
  return texts


def _train(texts: list[str], model: pathlib.Path) -> None:
  from nl_jax.data import tokenizer_training

  size = sum(map(len, texts))
  tokenizer_training.train(texts, size, model, _VOCAB)


def _seconds_of_job(
  folder: pathlib.Path, sequence_length: int, tokenizer: str
) -> tuple[float, float]:
  """Least seconds of preparing the text, and of encoding it alone."""
  from nl_jax.data import partition, preparation

  settings = partition.Settings(
    "text", str(folder / "corpus.txt"), tokenizer, sequence_length, 1
  )
  made = preparation.check(settings)
  about = preparation.claim(settings, made)
  (pieces,) = partition.plan(settings)
  texts = [d.text for p in pieces for d, _ in partition.read(p, settings)]
  whole = alone = float("inf")
  for turn in range(_ROUNDS):
    out = folder / f"{pathlib.Path(tokenizer).stem}{turn}"
    preparation.open_folder(out, about)
    job = preparation.Job(0, pieces, settings, str(out))
    begin = time.perf_counter()
    preparation.run_job(job, lambda size: None)
    whole = min(whole, time.perf_counter() - begin)
    begin = time.perf_counter()
    for text in texts:
      made.encode(text)
    alone = min(alone, time.perf_counter() - begin)
  preparation.finish(out, settings, about, made, 1)
  return whole, alone


def _waiting(
  folder: pathlib.Path, step: Callable[[], Any], length: int, batch: int
) -> float:
  """Share of the time of some steps that a loop waits for its batches."""
  import jax

  from nl_jax import data

  rows = data.load(
    source="prepared",
    path=str(folder / f"bytes{_ROUNDS - 1}"),
    sequence_length=length,
    batch_size=batch,
  ).train
  next(rows)
  jax.block_until_ready(step())
  waited, begin = 0.0, time.perf_counter()
  for _ in range(_STEPS):
    asked = time.perf_counter()
    next(rows)
    waited += time.perf_counter() - asked
    jax.block_until_ready(step())
  return waited / (time.perf_counter() - begin)
