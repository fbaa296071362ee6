"""The faults: what is done to a run, up to its last start.

A kind is a function of a scene. It starts the run, hurts it and checks how the
starts ended; where a sentence asks for something, it does it. When it returns,
the same command as ever must end the run.
"""

import resource
import signal
import time
from collections.abc import Callable

from experiments.faults import data
from experiments.faults import scene as scene_lib

Scene = scene_lib.Scene
SKIPPED = "nan_skipped"
POISON = 3 * scene_lib.STEPS // 8  # The batch that SKIPPED skips.
SKIP = "--config.train.nan_policy=skip"
_INTERRUPTED = (130, -signal.SIGINT)  # Which shells show as 130.
_LARGEST = 2**17  # Bytes of a file on a disk that is full, at most.


def sigkill(scene: Scene) -> None:
  """SIGKILL."""
  with scene.start() as start:
    scene.blow(start, signal.SIGKILL)
    scene.end(start, (-signal.SIGKILL,))


def sigkill_twice(scene: Scene) -> None:
  """SIGKILL, and again while the run continues."""
  sigkill(scene)
  sigkill(scene)


def sigterm(scene: Scene) -> None:
  """SIGTERM: saves and ends, or ends at once before there is a run."""
  with scene.start() as start:
    scene.blow(start, signal.SIGTERM)
    scene.end(start, (0, -signal.SIGTERM))


def ctrl_c(scene: Scene) -> None:
  """SIGINT: saves and ends."""
  with scene.start() as start:
    scene.blow(start, signal.SIGINT)
    _end_interrupted(scene, start)


def ctrl_c_twice(scene: Scene) -> None:
  """SIGINT, and soon another."""
  with scene.start() as start:
    scene.blow(start, signal.SIGINT)
    time.sleep(scene.rng.uniform(0, 0.1))
    start.process.send_signal(signal.SIGINT)
    _end_interrupted(scene, start)


def _end_interrupted(scene: Scene, start: scene_lib.Start) -> None:
  """What came when all was done changes nothing."""
  ended = scene.end(start, (0, *_INTERRUPTED))
  if not ended.status and not scene.is_done:
    raise scene_lib.WrongError("did not hear Ctrl-C")


def torn_checkpoint(scene: Scene) -> None:
  """SIGKILL, and the newest checkpoint is damaged."""
  with scene.start() as start:
    scene.blow(start, signal.SIGKILL, scene_lib.EVERY + 1)
    scene.end(start, (-signal.SIGKILL,))
  folder = scene.workdir / "checkpoints"
  steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  if not steps:
    raise scene_lib.MissedError
  scene.done.append(data.tear(folder / str(steps[-1]), scene.rng))
  older = steps[-2] if len(steps) > 1 else 0
  scene.marks[-1] = scene.marks[-1]._replace(promised=older)
  if older:
    return
  with scene.start() as start:
    # Of a checkpoint that is none, or still can be read, it says nothing.
    if scene.end(start, (0, 1)).status:
      scene.workdir.rename(scene.workdir.with_name("moved"))


def full_disk(scene: Scene) -> None:
  """From a moment on the system lets no file grow beyond some bytes."""
  with scene.start() as start:
    scene.reach(start)
    size = int(2 ** scene.rng.uniform(0, _LARGEST.bit_length() - 1))
    kind = resource.RLIMIT_FSIZE
    limits = (size, resource.getrlimit(kind)[1])
    resource.prlimit(start.process.pid, kind, limits)
    scene.done.append(f"files of at most {size} bytes")
    scene.end(start, (0, 1))


def shard_missing(scene: Scene) -> None:
  """A shard of the data vanishes, under a run or between two starts."""
  _hurt_data(scene, data.lose_shard)


def shard_corrupt(scene: Scene) -> None:
  """A shard of the data is cut or written over, likewise."""
  _hurt_data(scene, data.garble_shard)


def _hurt_data(scene: Scene, hurt: Callable) -> None:
  shards = scene.corpus / data.SHARDS
  with scene.start() as start:
    scene.reach(start)
    if under := scene.rng.random() < 0.5:
      scene.done.append(hurt(shards, scene.rng))
    else:
      start.process.kill()
    scene.end(start, (0, 1) if under else (-signal.SIGKILL,))
  if not under:
    scene.done.append("SIGKILL, " + hurt(shards, scene.rng))
    with scene.start() as start:
      scene.end(start, (0, 1))
  data.prepare(scene.corpus)


def nan(scene: Scene) -> None:
  """A batch that is not finite, with train.nan_policy=raise."""
  batch = int(scene.rng.integers(0, scene_lib.STEPS))
  scene.done.append(f"batch {batch}")
  with scene.start(batch) as start:
    scene.end(start, (1,))
  scene.mark()
  report = scene.workdir / f"nan_step_{batch + 1}.json"
  if not report.exists():
    raise scene_lib.WrongError(f"wrote no {report.name}")


def nan_skipped(scene: Scene) -> None:
  """A batch that is not finite and is skipped, and SIGKILL."""
  with scene.start(POISON, SKIP) as start:
    scene.blow(start, signal.SIGKILL)
    scene.end(start, (-signal.SIGKILL,))


KINDS: dict[str, Callable[[Scene], None]] = {
  "sigkill": sigkill,
  "torn_checkpoint": torn_checkpoint,
  "full_disk": full_disk,
  "sigterm": sigterm,
  "shard_corrupt": shard_corrupt,
  "ctrl_c": ctrl_c,
  "nan": nan,
  "shard_missing": shard_missing,
  "sigkill_twice": sigkill_twice,
  "ctrl_c_twice": ctrl_c_twice,
  SKIPPED: nan_skipped,
}
