"""A memory as a file: the state of a model, without its weights.

`save_memory` writes it, and `load_memory` gives it back to the model that it
came from.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax import files, formats, tensors
from nl_jax.models import lm
from nl_jax.stream import states, upgrade

FORMAT = 2  # Of a memory file.
# Fields that change no number, of the model and of all that is in it.
_FREE = ("sequence_length", "remat", "walk", "at_edge")
_KEY = "nl_jax"  # Of the manifest, in the file's metadata.
_FIELDS = {"model", "weights", "rows", "slots", "tokens_seen", "leaves"}
_LOGITS = "logits"
_POINT = "points/"


def save_memory(
  path: str | os.PathLike,
  model: lm.LanguageModel,
  params: Any,
  state: lm.LMState,
  *,
  logits: jax.Array | None = None,
  points: Mapping[str, states.Point] | None = None,
  about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Writes a memory to one safetensors file, as a whole or not at all.

  The weights are not in it, only their hash. A memory of the same model at the
  path is replaced.

  Args:
    path: of the file.
    model: that the state belongs to.
    params: the weights that it was learned with.
    state: what was read, B rows.
    logits: [B,Vocab] after the last token, to sample on without a token.
    points: of the stream, to roll back to later.
    about: JSON values to keep in the manifest.

  Returns:
    The manifest: format, hashes of model and weights, tokens seen by each row,
    clocks by level, leaves, slots of an attention cache, points, time,
    `about`.

  Raises:
    ValueError: the path holds something else, or the state is not finite.
    StorageError: the system refuses; what was at the path stays.
  """
  path = pathlib.Path(path)
  _check_taken(path, model)
  manifest = {
    "format": FORMAT,
    "model": model_hash(model),
    "weights": weights_hash(params),
    "rows": int(state.position_B.shape[0]),
    "slots": states.slots(model, state),
    "tokens_seen": [int(x) for x in np.asarray(state.position_B)],
    "clocks": _clocks(state),
    "leaves": _describe(state),
    "points": {
      name: {"seen": point.seen, "about": point.about}
      for name, point in (points or {}).items()
    },
    "time": round(time.time(), 3),
    "about": dict(about or {}),
  }
  leaves = {name: np.asarray(x) for name, x in states.named(state)}
  if logits is not None:
    leaves[_LOGITS] = np.asarray(logits)
  for name, point in (points or {}).items():
    of_point = {key: np.asarray(x) for key, x in states.named(point.state)}
    if point.logits is not None:
      of_point[_LOGITS] = np.asarray(point.logits)
    leaves |= {_POINT + f"{name}/{key}": x for key, x in of_point.items()}
  _check_finite(path, leaves)
  tensors.write(path, leaves, {_KEY: json.dumps(manifest)})
  return manifest


def check_place(
  path: str | os.PathLike,
  flag: str,
  model: lm.LanguageModel,
  state: lm.LMState,
) -> None:
  """Finds before a long text that its memory could not be kept.

  Args:
    path: of the file.
    flag: that named it, as "--memory_out".
    model: that is to read.
    state: its state, of the size that it will have.

  Raises:
    ValueError: a folder, or something that is not a memory of this model.
    StorageError: the system refuses, or has too little space.
  """
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  files.check_place(path, flag, size)
  _check_taken(pathlib.Path(path), model)


def _check_taken(path: pathlib.Path, model: lm.LanguageModel) -> None:
  """Raises ValueError unless a memory may be written to a path."""
  if path.exists() and read_manifest(path)["model"] != model_hash(model):
    raise ValueError(
      f"{path} holds the memory of another model; give another file"
    )


def load_memory(
  path: str | os.PathLike,
  model: lm.LanguageModel,
  params: Any,
  *,
  other_weights: bool = False,
) -> tuple[lm.LMState, jax.Array | None, dict[str, Any]]:
  """Reads a memory file.

  Args:
    path: of `save_memory`.
    model: that it belongs to.
    params: the weights.
    other_weights: take a memory that was learned with other weights.

  Returns:
    The state, the logits after its last token (None if they were not kept),
    and the manifest.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: no memory file, a torn or damaged one, or one of another model
      or weights.
  """
  manifest = read_manifest(path)
  if manifest["model"] != model_hash(model):
    raise ValueError(
      f"{path} is the memory of another model (hash "
      f"{manifest['model'][:12]}, this one {model_hash(model)[:12]}); give the "
      "run that wrote it"
    )
  if manifest["weights"] != weights_hash(params) and not other_weights:
    raise ValueError(
      f"{path} was learned with other weights of this model (another "
      "checkpoint or run); give that one, or allow other weights"
    )
  found, _ = tensors.read(path)
  _check_finite(path, found)
  leaves: dict[str, Any] = {
    k: x for k, x in found.items() if not k.startswith(_POINT)
  }
  like = jax.eval_shape(
    lambda p: model.init_state(p, manifest["rows"], manifest["slots"]), params
  )
  logits = leaves.pop(_LOGITS, None)
  if logits is not None:
    wanted = {_LOGITS: f"float32[{manifest['rows']}, {model.vocab_size}]"}
    _check_leaves(path, {_LOGITS: logits}, wanted)
    logits = jnp.asarray(logits)
  if manifest["format"] == 1:
    _check_leaves(path, leaves, manifest["leaves"])
    leaves = upgrade.memory(leaves, model, params)
  _check_leaves(path, leaves, _describe(like))
  names = [name for name, _ in states.named(like)]
  tree = jax.tree.structure(like)
  state = jax.tree.unflatten(tree, [jnp.asarray(leaves[x]) for x in names])
  return state, logits, manifest


def load_points(
  path: str | os.PathLike, state: lm.LMState, manifest: Mapping[str, Any]
) -> dict[str, states.Point]:
  """The points of a memory file, of states like the one given."""
  found = manifest.get("points", {})
  if not found:
    return {}
  leaves, _ = tensors.read(path)
  points = {}
  for name, said in found.items():
    start = f"{_POINT}{name}/"
    own = {
      key.removeprefix(start): x
      for key, x in leaves.items()
      if key.startswith(start)
    }
    logits = own.pop(_LOGITS, None)
    _check_leaves(path, own, _describe(state))
    arrays = [jnp.asarray(own[key]) for key, _ in states.named(state)]
    points[name] = states.Point(
      jax.tree.unflatten(jax.tree.structure(state), arrays),
      None if logits is None else jnp.asarray(logits),
      said["seen"],
      said["about"],
    )
  return points


def _check_leaves(
  path: str | os.PathLike,
  leaves: Mapping[str, jax.Array | np.ndarray],
  wanted: Mapping[str, str],
) -> None:
  """Raises ValueError for arrays of other names, dtypes or shapes."""
  found = {k: f"{x.dtype}{list(x.shape)}" for k, x in leaves.items()}
  wrong = [
    f"{k} is {found.get(k, 'missing')}, expected {wanted.get(k, 'nothing')}"
    for k in sorted({*found, *wanted})
    if found.get(k) != wanted.get(k)
  ]
  if wrong:
    raise ValueError(f"{path} does not fit this model: {'; '.join(wrong[:5])}")


def _check_finite(
  path: str | os.PathLike, leaves: Mapping[str, np.ndarray]
) -> None:
  """Raises ValueError for numbers that no memory holds."""
  for name, x in leaves.items():
    if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(x).all():
      raise ValueError(
        f"{path}: {name} is not finite, so this memory cannot be resumed; "
        "read the text again with a checkpoint whose loss is finite"
      )


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
  """The manifest of a memory file; its arrays are not read.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: no memory file, a torn one, or one of an unknown format.
  """
  import safetensors

  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"no memory file {path}")
  try:
    with safetensors.safe_open(str(path), "numpy") as file:
      texts = tensors.open_texts(path, file.metadata())
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} is not a memory file, or a torn one ({error})"
    ) from error
  if _KEY not in texts:
    raise ValueError(f"{path} is a safetensors file but no memory")
  try:
    manifest = json.loads(texts[_KEY])
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is a damaged memory file ({error})") from error
  otherwise = "read the text again with the command that wrote the file"
  found = manifest.get("format") if isinstance(manifest, dict) else None
  formats.check(path, "a memory", found, FORMAT, otherwise)
  missing = sorted(_FIELDS - {*manifest})
  if missing:
    raise ValueError(
      f"{path} is a damaged memory file: it does not say {', '.join(missing)}"
    )
  return manifest


def model_hash(model: lm.LanguageModel) -> str:
  """SHA-256 (hex) of all that decides the shape and meaning of a state.

  Not in it: `sequence_length`, `remat` and others that change no number of it.
  The fields go by the names that they had in the first memory files.
  """
  values = _without_free(dataclasses.asdict(model))
  net = values.get("base", values)
  mixer = net.pop("mixer")
  if mixer and "memory" in mixer:
    mixer["arch"] = mixer.pop("memory")
  if mixer and "remat_group" in mixer:
    mixer["remat_group"] = 4  # Of the first files; it changes no number.
  if mixer and mixer.get("span") == 0:
    del mixer["span"]  # A switch that the first files did not have, off.
  net["memory"] = mixer
  text = json.dumps(values, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()


def _without_free(values: Any) -> Any:
  if not isinstance(values, dict):
    return values
  return {k: _without_free(x) for k, x in values.items() if k not in _FREE}


def weights_hash(params: Any) -> str:
  """SHA-256 (hex) of all weights, by name."""
  digest = hashlib.sha256()
  for name, x in states.named(params):
    digest.update(f"{name}\0{x.dtype}{x.shape}\0".encode())
    digest.update(np.ascontiguousarray(np.asarray(x)).tobytes())
  return digest.hexdigest()


def _clocks(state: lm.LMState) -> dict[str, list[int]]:
  """Each row's place in the open chunks: of memories, in the first layer."""
  clocks = {}
  for name, leaf in states.named(state):
    if name.endswith(("phase", "clock", "phase_B")):
      rows = np.asarray(leaf)
      if name.startswith("layers/"):
        rows = rows[:1].ravel()  # There may be no layer of this kind.
      if rows.size:
        clocks[name] = [int(x) for x in rows]
  return clocks


def _describe(tree: Any) -> dict[str, str]:
  return {name: f"{x.dtype}{list(x.shape)}" for name, x in states.named(tree)}
