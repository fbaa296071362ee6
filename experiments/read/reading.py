"""Reading a text of any length, in constant memory, and what it showed."""

import codecs
import dataclasses
import hashlib
import pathlib
import sys
import time
from typing import Any

import numpy as np

from experiments.cli import generation
from nl_jax import stream
from nl_jax.data import documents

_BLOCK = 2**16  # Bytes of text that are read at once.
_BINS = 128  # Points of the curve, at most twice as many while it grows.
_PLACES = 8  # Parts of a chunk whose surprise is distinguished.


class Curve:
  """A mean over tokens in bins, whose width doubles when there are too many."""

  def __init__(self):
    self.width = 64
    self.sums: list[float] = []
    self.counts: list[int] = []

  def add(self, first: int, nats: np.ndarray) -> None:
    """Values of the tokens from number `first` on."""
    bins = (first + np.arange(len(nats))) // self.width
    for number in np.unique(bins):
      chosen = nats[bins == number]
      while len(self.sums) <= number:
        self.sums.append(0.0)
        self.counts.append(0)
      self.sums[number] += float(np.nansum(chosen))
      self.counts[number] += int(np.isfinite(chosen).sum())
    if len(self.sums) > 2 * _BINS:
      self.sums, self.counts = (
        [sum(x[i : i + 2]) for i in range(0, len(x), 2)]
        for x in (self.sums, self.counts)
      )
      self.width *= 2

  def points(self) -> tuple[list[int], list[float]]:
    """(token numbers, means)."""
    kept = [i for i, count in enumerate(self.counts) if count]
    middle = [int((i + 0.5) * self.width) for i in kept]
    return middle, [self.sums[i] / self.counts[i] for i in kept]


@dataclasses.dataclass
class Result:
  """What a reading showed.

  Attributes:
    begin: tokens that the reader had read before.
    tokens: read now.
    bytes: read now.
    nats: their sum; the first token of a stream has none.
    seconds: of reading.
    place: {"bytes", "sha256"} of the text read so far.
    curve: nat per token over the text.
    without: the same with a memory that begins again (`Forgetful`); no point
      where it was not asked for.
    forget_every: tokens after which that one begins again; 0: it was not.
    nats_without: its sum.
    chunks: by the names of the levels of a period: the period in tokens, and
      [sum, count] of nats by the part of it that a token stands in.
  """

  begin: int = 0
  tokens: int = 0
  bytes: int = 0
  nats: float = 0.0
  seconds: float = 0.0
  place: dict[str, Any] = dataclasses.field(default_factory=dict)
  curve: Curve = dataclasses.field(default_factory=Curve)
  without: Curve = dataclasses.field(default_factory=Curve)
  forget_every: int = 0
  nats_without: float = 0.0
  chunks: dict[str, tuple[int, np.ndarray]] = dataclasses.field(
    default_factory=dict
  )

  def summary(self) -> str:
    """A line of figures, and one a level."""
    if not self.tokens:
      return "nothing left to read"
    lines = [
      f"{self.bytes:,} bytes, {self.tokens:,} tokens: "
      f"{self.nats / self.bytes:.4f} nat per byte, "
      f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens a second"
    ]
    if self.forget_every:
      lines.append(
        f"with a memory that begins again every {self.forget_every:,} tokens: "
        f"{self.nats_without / self.bytes:.4f} nat per byte"
      )
    for name, (period, parts) in self.chunks.items():
      means = parts[:, 0] / np.maximum(parts[:, 1], 1)
      lines.append(
        f"{name}, every {period} tokens: {means[-1]:.4f} nat per token before "
        f"an update, {means[0]:.4f} after it"
      )
    return "\n".join(lines)


class Forgetful:
  """A model that begins again every so many tokens: what memory is worth.

  A token at a new beginning is still predicted from the one before it.
  """

  def __init__(self, model: Any, params: Any, every: int):
    """Args: a `LanguageModel`, its weights, tokens between two beginnings."""
    self._model, self._params, self.every = model, params, every
    self._reader = stream.start(model, params)
    self._last: np.ndarray | None = None
    self._left = every

  def score(self, ids_1xT: np.ndarray) -> np.ndarray:
    """Nats of tokens [1,T], as `stream.Stream.score`."""
    found, at = [], 0
    while at < ids_1xT.shape[1]:
      if not self._left:
        self._reader = stream.start(self._model, self._params)
        self._reader.read(self._last)
        self._left = self.every
      piece = ids_1xT[:, at : at + self._left]
      found.append(self._reader.score(piece))
      self._last = piece[:, -1:]
      self._left -= piece.shape[1]
      at += piece.shape[1]
    return np.concatenate(found, axis=1)


def check_text(text: pathlib.Path) -> None:
  """Raises ValueError, with the place, for a text that is not UTF-8."""
  decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
  with text.open("rb") as file:
    while True:
      block = file.read(_BLOCK)
      held = decoder.getstate()[0]
      try:
        decoder.decode(block, final=not block)
      except UnicodeDecodeError:
        documents.decode(held + block, text, at - len(held))
      if not block:
        return
      at += len(block)


def place(text: pathlib.Path, before: dict[str, Any] | None) -> int:
  """The byte to resume from: 0, unless the text begins as what was read."""
  if not before:
    return 0
  digest, left = hashlib.sha256(), before["bytes"]
  with text.open("rb") as file:
    while left and (block := file.read(min(_BLOCK, left))):
      digest.update(block)
      left -= len(block)
  same = not left and digest.hexdigest() == before["sha256"]
  return before["bytes"] if same else 0


def read(
  reader: stream.Stream,
  tokenizer: Any,
  text: pathlib.Path,
  start: int,
  net: Any,
  asked: Any,
  without: Forgetful | None = None,
) -> Result:
  """Reads a text from a byte on, until its end or until it is asked to stop.

  The text is cut after line ends (where a block has one), and its pieces are
  tokenised one by one.

  Args:
    reader: the stream.
    tokenizer: of its model.
    text: the file.
    start: byte to resume from.
    net: the model: for its levels.
    asked: of `stop.listen`.
    without: reads the same, to compare; its time is not counted.

  Raises:
    ValueError: the text is not UTF-8.
  """
  done = Result(begin=int(reader.state.position_B[0]))
  by_period: dict[int, list[str]] = {}
  for row in net.levels()[0]:
    if row.state_bytes and row.chunk > 1:
      by_period.setdefault(row.chunk, []).append(row.name)
  done.chunks = {
    "; ".join(names): (period, np.zeros((_PLACES, 2)))
    for period, names in by_period.items()
  }
  done.forget_every = without.every if without else 0
  digest = hashlib.sha256()
  size = text.stat().st_size
  with text.open("rb") as file, _Bar(start, size) as bar:
    for _ in range(0, start, _BLOCK):
      digest.update(file.read(min(_BLOCK, start - file.tell())))
    while not asked.reason and (block := _piece(file)):
      offset = start + done.bytes
      piece = documents.decode(block, text, offset)
      ids = generation.encode(tokenizer, piece, is_first=not offset)
      digest.update(block)
      done.bytes += len(block)
      if len(ids):
        _add(done, reader, np.asarray(ids, np.int32), without)
      bar(start + done.bytes, done)
    done.place = {"bytes": start + done.bytes, "sha256": digest.hexdigest()}
  return done


def _piece(file: Any) -> bytes:
  """The next bytes: whole characters, and whole lines where there is one."""
  block = file.read(_BLOCK)
  if len(block) < _BLOCK:
    return block
  cut = block.rfind(b"\n") + 1
  if not cut:
    # Whole characters: a decoder holds the bytes of one that is not.
    held = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held.decode(block)
    cut = len(block) - len(held.getstate()[0])
  file.seek(cut - len(block), 1)
  return block[:cut]


def _add(
  done: Result,
  reader: stream.Stream,
  ids: np.ndarray,
  without: Forgetful | None,
) -> None:
  """Reads tokens and notes how much each surprised."""
  first, begin = done.begin + done.tokens, time.monotonic()
  nats = reader.score(ids[None])[0]
  done.seconds += time.monotonic() - begin
  if without:
    others = without.score(ids[None])[0]
    # Only tokens that both have predicted.
    others = np.where(np.isfinite(nats), others, np.nan)
    done.without.add(done.tokens, others)
    done.nats_without += float(np.nansum(others))
  done.curve.add(done.tokens, nats)
  done.tokens += len(ids)
  done.nats += float(np.nansum(nats))
  known = np.isfinite(nats)
  # A token is predicted from the one before: after chunk c's last token.
  at = first + np.arange(len(ids)) - 1
  for period, parts in done.chunks.values():
    part = (at % period) * _PLACES // period
    for i in range(_PLACES):
      chosen = nats[known & (part == i)]
      parts[i] += (chosen.sum(), len(chosen))


def draw(done: Result, path: pathlib.Path) -> None:
  """Surprise over the text, and within the chunks of each memory.

  Raises:
    StorageError: the picture cannot be written.
  """
  from nl_jax.report import charts

  every = f"memory begins again every {done.forget_every:,} tokens"
  over = [
    charts.Curve("memory continues" if done.forget_every else "",
                 *done.curve.points(), 0),
    charts.Curve(every, *done.without.points(), 1, style=1),
  ]  # fmt: skip
  within = []
  for number, (name, (period, parts)) in enumerate(done.chunks.items()):
    means = parts[:, 0] / np.maximum(parts[:, 1], 1)
    place = [100 * (i + 0.5) / _PLACES for i in range(_PLACES)]
    label = f"{name} (every {period} tokens)"
    within.append(charts.Curve(label, place, list(means), number, marks=True))
  panels = [
    charts.Panel(
      "Surprise over the text (nat per token)", "tokens read",
      [curve for curve in over if curve.xs],
    ),
    charts.Panel(
      "Surprise within a chunk: updates are at 0 and 100 % (nat per token)",
      "place in the chunk (%)", within,
    ),
  ]  # fmt: skip
  shown = [p for p in panels if p.curves]
  charts.save(shown, path.with_suffix("").name, path)


class _Bar:
  """A progress bar on a terminal; elsewhere a line now and then."""

  def __init__(self, start: int, size: int):
    import rich.console
    import rich.progress

    self._plain = not sys.stderr.isatty()
    self._size, self._told = size, time.monotonic()
    self._bar = rich.progress.Progress(
      rich.progress.BarColumn(),
      rich.progress.DownloadColumn(),
      rich.progress.TextColumn("{task.description}"),
      rich.progress.TimeRemainingColumn(),
      console=rich.console.Console(stderr=True),
      disable=self._plain,
    )
    self._task = self._bar.add_task("", total=size, completed=start)
    if self._plain:
      print(f"reading from byte {start:,} of {size:,}", file=sys.stderr)

  def __enter__(self) -> Any:
    self._bar.start()
    return self._show

  def __exit__(self, *error: object) -> None:
    self._bar.stop()

  def _show(self, read: int, done: Result) -> None:
    text = f"{done.nats / max(done.bytes, 1):.3f} nat/byte"
    self._bar.update(self._task, completed=read, description=text)
    if self._plain and time.monotonic() - self._told > 10:
      self._told = time.monotonic()
      print(f"{read:,} of {self._size:,} bytes, {text}", file=sys.stderr)
