"""What a memory is worth beyond the trained row, by how it was trained.

Every model is trained twice on the same tokens, each read once: in packed rows,
each from an empty memory, and as streams, whose memory is carried from row to
row. Both then read held-out text in rows of eight times the trained length.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study import studies
from nl_jax import files

ARMS = ("packed", "stream")
FACTOR = 8  # The rows that are read, over those of training.
# Of the buckets of positions, in trained rows.
EDGES = (0, 1, 2, 4, 8)
_ROWS = 48
_AT_ONCE = 16


def write_text(path: pathlib.Path, size: int) -> None:
  """Writes training files of the embedded corpus, a line each, as JSON.

  Args:
    path: the file, a .jsonl; one that is there is left as it is.
    size: bytes of text, at least, unless the corpus has less.
  """
  from nl_jax.data import sources

  if path.exists():
    return
  texts = sources.embedded().train
  lines, found = [], 0
  for i in np.random.default_rng(0).permutation(len(texts)):
    if found >= size:
      break
    lines.append(json.dumps({"text": texts[i]}) + "\n")
    found += len(texts[i].encode())
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write(path, "".join(lines))


def windows(length: int) -> np.ndarray:
  """int32 [rows, length + 1]: held-out text of the embedded corpus.

  No window goes from one file into another; they are spread over all of them.
  """
  from nl_jax.data import sources, tokenizers

  encode, found = tokenizers.Bytes().encode, []
  for text in sources.embedded().validation:
    ids = np.asarray(encode(text), np.int32)
    found += [
      ids[at : at + length + 1] for at in range(0, len(ids) - length, length)
    ]
  chosen = np.linspace(0, len(found) - 1, min(_ROWS, len(found)))
  return np.stack([found[i] for i in chosen.astype(int)])


@functools.partial(jax.jit, static_argnums=0)
def _nats(net: Any, params: Any, inputs: jax.Array, targets: jax.Array):
  """Nats of the targets [B,T], each row read from an empty memory."""
  logits, _, _ = net.apply(params, inputs)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def measure(folder: pathlib.Path, length: int) -> dict[str, np.ndarray]:
  """Nats of a trained run, mean over rows, by position [FACTOR * length].

  Args:
    folder: the workdir of the run.
    length: tokens of a row that it was trained with.

  Returns:
    `carried`: one memory from the beginning of the row; `fresh`: an empty
    memory at each multiple of the trained length.
  """
  from nl_jax import build
  from nl_jax.train import checkpoint

  _, net = build.of_run(str(folder))
  params, _ = checkpoint.load_params(str(folder), net)
  rows = windows(FACTOR * length)
  made: dict[str, list[np.ndarray]] = {"carried": [], "fresh": []}
  for at in range(0, len(rows) - len(rows) % _AT_ONCE, _AT_ONCE):
    part = rows[at : at + _AT_ONCE]
    for name, width in (("carried", FACTOR * length), ("fresh", length)):
      inputs, targets = (
        x.reshape(-1, width) for x in (part[:, :-1], part[:, 1:])
      )
      nats = np.asarray(_nats(net, params, inputs, targets))
      made[name].append(nats.reshape(_AT_ONCE, -1))
  return {name: np.concatenate(x).mean(axis=0) for name, x in made.items()}


def buckets(nats: np.ndarray, length: int) -> np.ndarray:
  """Means of nats [FACTOR * length] over each bucket of positions."""
  ends = zip(EDGES, EDGES[1:])
  return np.array([nats[a * length : b * length].mean() for a, b in ends])


def tell(runs: Sequence[Any], folder: pathlib.Path, length: int) -> str:
  """The table of nats by position, with paired differences, and the picture.

  Args:
    runs: finished, their rows named model_arm.
    folder: of the picture.
    length: tokens of a trained row.
  """
  from nl_jax.report import charts

  spans = [f"{a * length}–{b * length}" for a, b in zip(EDGES, EDGES[1:])]
  lines = [
    f"| model, trained | {' | '.join(spans)} | worth of the carried memory | "
    "seeds |",
    "|---|" + "---|" * (len(spans) + 2),
  ]
  models: dict[str, dict[str, dict[int, np.ndarray]]] = {}
  for run in runs:
    model, _, arm = run.row.rpartition("_")
    nats = measure(run.folder, length)
    carried, fresh = (buckets(nats[x], length) for x in ("carried", "fresh"))
    later = (nats["fresh"] - nats["carried"])[length:].mean()
    numbers = np.append(carried, later)
    models.setdefault(model, {}).setdefault(arm, {})[run.seed] = numbers
  differences = charts.Panel(
    "stream - packed: nat per byte, every seed", "byte of the row", []
  )
  panels = []
  middles = [(a + b) / 2 * length for a, b in zip(EDGES, EDGES[1:])]
  for number, (model, arms) in enumerate(models.items()):
    panel = charts.Panel(f"{model}: nat per byte", "byte of the row", [])
    panels.append(panel)
    for style, (arm, seeds) in enumerate(arms.items()):
      lines.append(_line(f"{model}, {arm}", list(seeds.values())))
      ys = np.mean(list(seeds.values()), axis=0)[:-1].tolist()
      panel.curves.append(
        charts.Curve(arm, middles, ys, style, style, marks=True)
      )
    both = sorted(set.intersection(*(set(arms.get(x, ())) for x in ARMS)))
    if both:
      pairs = [arms["stream"][s] - arms["packed"][s] for s in both]
      lines.append(_line(f"{model}, stream - packed", pairs, "+.3f"))
      for i, pair in enumerate(pairs):
        differences.curves.append(
          charts.Curve(
            "" if i else model, middles, pair[:-1].tolist(), number, marks=True
          )
        )
  charts.png(
    [*panels, differences], "Beyond the trained row", folder / "table.png"
  )
  return "\n".join(lines)


def _line(name: str, seeds: list[np.ndarray], form: str = ".3f") -> str:
  cells = [studies.cell(list(x), form) for x in np.array(seeds).T]
  return f"| {name} | {' | '.join(cells)} | {len(seeds)} |"
