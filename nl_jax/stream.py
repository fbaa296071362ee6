"""One model, one state: prefill, decode, sample, save and load a memory.

A stream reads tokens through `LMState`, the state that training uses too, so
what it says equals one call over all tokens. A token costs the same however
many came before, unless the model has an unbounded attention cache.

What it remembers can be rolled back to a named point, and can be given a bound
on how far it may move from one.

A memory is a file: `save_memory` writes the state, without the weights, and
`load_memory` gives it back to the model that it came from.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from nl_jax import drift, files, formats, sharding, tensors, upgrade
from nl_jax.models import lm

FORMAT = 2  # Of a memory file.
# Fields that change no number, of the model and of all that is in it.
_FREE = ("sequence_length", "remat", "walk", "at_edge")
_KEY = "nl_jax"  # Of the manifest, in the file's metadata.
_FIELDS = {"model", "weights", "rows", "slots", "tokens_seen", "leaves"}
_LOGITS = "logits"
_POINT = "points/"
# Prompts are read in pieces of these lengths, so that few shapes compile.
_PIECES = (256, 16, 1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _read(
  model: lm.LanguageModel, params: Any, tokens: jax.Array, state: lm.LMState
) -> tuple[jax.Array, lm.LMState]:
  """Logits after the last token [B,Vocab], and the state."""
  logits, state, _ = model.apply(params, tokens, state)
  return logits[:, -1], state


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _score(
  model: lm.LanguageModel,
  params: Any,
  tokens: jax.Array,
  state: lm.LMState,
  before: jax.Array,
) -> tuple[jax.Array, jax.Array, lm.LMState]:
  """Nats of each token [B,T], logits after the last [B,Vocab], the state."""
  logits, state, _ = model.apply(params, tokens, state)
  ahead = jnp.concatenate([before[:, None], logits[:, :-1]], axis=1)
  chosen = jnp.take_along_axis(ahead, tokens[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(ahead, -1) - chosen, logits[:, -1], state


@functools.partial(jax.jit, static_argnums=(0, 4))
def _choose(
  vocab_size: int,
  logits: jax.Array,
  key: jax.Array,
  temperature: jax.Array,
  nucleus: bool,
  top_p: jax.Array,
) -> jax.Array:
  """Ids [B] from logits [B,Vocab]; temperature 0 is the most likely one."""
  logits = logits[:, :vocab_size]
  scaled = logits / jnp.maximum(temperature, 1e-6)
  if nucleus:
    order = jnp.argsort(-scaled, axis=-1)
    sorted_logits = jnp.take_along_axis(scaled, order, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(sorted_logits, axis=-1), axis=-1)
    # A token stays if the mass before it is below top_p: the first always.
    kept = mass - jax.nn.softmax(sorted_logits, axis=-1) < top_p
    least = jnp.min(
      jnp.where(kept, sorted_logits, jnp.inf), axis=-1, keepdims=True
    )
    scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
  drawn = jax.random.categorical(key, scaled, axis=-1)
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))


class Point(NamedTuple):
  """What a stream remembered when it was marked.

  Attributes:
    state: of the model.
    logits: [B,Vocab] after its last token, or None.
    seen: tokens read.
    about: JSON values.
  """

  state: lm.LMState
  logits: jax.Array | None
  seen: int
  about: dict[str, Any]


@dataclasses.dataclass
class Stream:
  """A model that reads on from wherever it stands.

  Attributes:
    model: a `LanguageModel`.
    params: its weights.
    state: what it has read, B rows.
    slots: tokens that an unbounded attention cache has room for; None where
      the state does not grow.
    logits: [B,Vocab] after the last token; None before the first.
    points: what `mark` kept, by name.
    stopped_B: bool, rows that write no more; None without a bound.
    mesh: of the devices that share the work, or None.
  """

  model: lm.LanguageModel
  params: Any
  state: lm.LMState
  slots: int | None
  logits: jax.Array | None = None
  points: dict[str, Point] = dataclasses.field(default_factory=dict)
  stopped_B: np.ndarray | None = None
  mesh: jax.sharding.Mesh | None = None
  _seen: int = 0
  _bound: tuple[float, str] | None = None

  def read(self, tokens: np.ndarray) -> jax.Array:
    """Reads tokens [B,T], T >= 1 (prefill); returns the logits after them.

    Raises:
      ValueError: no token, or more than the attention cache has room for.
    """
    with self._where():
      for piece in self._pieces(tokens):
        held = self._held()
        logits, self.state = _read(self.model, self.params, piece, self.state)
        self.logits = logits
        self._hold(held)
    return logits

  def _where(self) -> contextlib.AbstractContextManager:
    """The mesh, for the layout of activations."""
    if self.mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self.mesh)

  def score(self, tokens: np.ndarray) -> np.ndarray:
    """Reads tokens [B,T] and returns the nats of each [B,T], float32.

    The first token of a stream has nothing before it: NaN.

    Raises:
      ValueError: as `read`.
    """
    scores = []
    for piece in self._pieces(tokens):
      first = self.logits is None
      before = self.logits
      if first:
        vocab_size = self.model.vocab_size
        before = jnp.full((piece.shape[0], vocab_size), jnp.nan)
      with self._where():
        held = self._held()
        nats, self.logits, self.state = _score(
          self.model, self.params, piece, self.state, before
        )
        self._hold(held)
      scores.append(np.asarray(nats, np.float32))
    return np.concatenate(scores, axis=1)

  def mark(self, name: str, about: Mapping[str, Any] | None = None) -> None:
    """Keeps what is remembered now as a named point.

    Args:
      name: of the point; one of that name is replaced.
      about: JSON values to keep with it.
    """
    state = clone(self.state)
    self.points[name] = Point(state, self.logits, self._seen, dict(about or {}))

  def roll_back(self, name: str) -> Point:
    """Goes back to a point: all that was read since then is forgotten.

    Raises:
      ValueError: no point of that name.
    """
    point = self._point(name)
    self.state, self.logits = clone(point.state), point.logits
    self._seen = point.seen
    if self.stopped_B is not None:
      self.stopped_B = np.zeros_like(self.stopped_B)
    return point

  def bound(self, limit: float, since: str) -> None:
    """Stops the writing of a row whose memory moves too far from a point.

    Such a row reads on as before, but its fast weights keep nothing of it. They
    are looked at after each piece of up to 256 tokens; a piece that went
    beyond the bound is not kept either.

    Args:
      limit: largest norm of the change of all fast weights of a row.
      since: name of the point.

    Raises:
      ValueError: no such point, no memory, or a limit that is not above 0.
    """
    if not 0 < limit < float("inf"):
      raise ValueError(f"the bound on drift must be above 0, got {limit}")
    if not drift.has_memory(self.state):
      raise ValueError(
        f"model.arch={self.model.arch!r} has no fast weights to bound"
      )
    self._point(since)
    self._bound = limit, since
    self.stopped_B = np.zeros(self.state.position_B.shape, bool)

  def drift(self, since: str) -> np.ndarray:
    """[B]: norm of the change of each row's fast weights since a point.

    Raises:
      ValueError: no point of that name.
    """
    return np.asarray(drift.distance(self.state, self._point(since).state))

  def _point(self, name: str) -> Point:
    if name not in self.points:
      known = ", ".join(self.points) or "none"
      raise ValueError(f"the memory has no point {name!r}; it has: {known}")
    return self.points[name]

  def _held(self) -> lm.LMState | None:
    """A copy to go back to; None where nothing is bounded."""
    return clone(self.state) if self._bound else None

  def _hold(self, held: lm.LMState | None) -> None:
    """Takes back what rows wrote that are, or now went, beyond the bound."""
    if held is None or self._bound is None or self.stopped_B is None:
      return
    limit, since = self._bound
    far_B = self.drift(since)
    new_B = ~(far_B <= limit) & ~self.stopped_B
    for row in np.flatnonzero(new_B):
      logging.warning(
        "row %d: its memory has moved by %.4g from the point %r, beyond the "
        "bound of %.4g; it writes no more",
        row, far_B[row], since, limit,
      )  # fmt: skip
    self.stopped_B = self.stopped_B | new_B
    if self.stopped_B.any():
      self.state = drift.hold(self.state, held, self.stopped_B)

  def _pieces(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The tokens in pieces of the lengths that are compiled."""
    tokens = np.asarray(tokens, np.int32)
    length = tokens.shape[1]
    if not length:
      raise ValueError("a stream was given no token to read")
    if self.slots is not None and self._seen + length > self.slots:
      raise ValueError(
        f"the attention cache has room for {self.slots} tokens, got "
        f"{length} more after {self._seen}; start with a larger length"
      )
    at = 0
    while at < length:
      size = next(p for p in _PIECES if p <= length - at)
      yield tokens[:, at : at + size]
      at += size
    self._seen += length

  def sample(
    self,
    tokens: int,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
  ) -> Iterator[np.ndarray]:
    """Draws tokens one by one, each [B], and reads each as it is drawn.

    Args:
      tokens: how many at most.
      vocab_size: ids below it are drawn: the tokenizer's.
      temperature: 0 takes the most likely token.
      top_p: mass of the most likely tokens that are drawn from.
      seed: of the draws.
      stop_id: ends the sample once every row has drawn it.

    Raises:
      ValueError: nothing read before, or settings out of range.
    """
    if self.logits is None:
      raise ValueError("a stream must read a token before it samples")
    if temperature < 0 or not 0 < top_p <= 1:
      raise ValueError(
        "temperature must be >= 0 and top_p in (0, 1], got "
        f"{temperature} and {top_p}"
      )
    key = jax.random.key(seed)
    ended = np.zeros(self.logits.shape[0], bool)
    for i in range(tokens):
      ids = np.asarray(
        _choose(
          vocab_size,
          self.logits,
          jax.random.fold_in(key, i),
          np.float32(temperature),
          top_p < 1,
          np.float32(top_p),
        )
      )
      yield ids
      ended |= ids == stop_id if stop_id is not None else False
      if ended.all() or i + 1 == tokens:
        return
      self.read(ids[:, None])


def start(
  model: lm.LanguageModel,
  params: Any,
  batch_size: int = 1,
  length: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Stream:
  """A stream that has read nothing.

  Args:
    model: a `LanguageModel`.
    params: its weights.
    batch_size: rows B.
    length: tokens that an unbounded attention cache has room for; default
      `model.sequence_length`.
    mesh: of the devices that share the work, all of this process: `tensor`
      splits weights and heads, `fsdp` the rows. None: where the weights are.

  Raises:
    ValueError: a mesh that does not divide rows or heads.
  """
  slots = None
  if model.grows:
    slots = model.sequence_length if length is None else length
  if mesh is not None and mesh.size > 1:
    return _on_mesh(model, params, batch_size, slots, mesh)
  # Copied: anchors and weights start as one buffer, which cannot be donated.
  state = jax.tree.map(jnp.copy, model.init_state(params, batch_size, slots))
  return Stream(model, params, state, slots)


def _on_mesh(
  model: lm.LanguageModel,
  params: Any,
  batch_size: int,
  slots: int | None,
  mesh: jax.sharding.Mesh,
) -> Stream:
  """A stream whose weights are laid for decoding."""
  shardings = sharding.decode_shardings(params, mesh)
  params = jax.device_put(for_decoding(model, params), shardings)
  start = lambda params: model.init_state(params, batch_size, slots)
  places = sharding.sequence_shardings(jax.eval_shape(start, params), mesh)
  with jax.set_mesh(mesh):
    state = jax.jit(start, out_shardings=places)(params)
  return Stream(model, params, state, slots, mesh=mesh)


def mesh_of(
  model: lm.LanguageModel, params: Any, devices: Sequence[jax.Device]
) -> jax.sharding.Mesh:
  """As many of the devices as can share the weights of one row's tokens.

  Args:
    model: a `LanguageModel`.
    params: its weights, or their shapes.
    devices: of this process.
  """
  state = jax.eval_shape(lambda p: model.init_state(p, 1, 1), params)
  for count in range(len(devices), 1, -1):
    mesh = sharding.mesh(fsdp=1, tensor=count, devices=devices[:count])
    try:
      sharding.decode_shardings(params, mesh)
      sharding.sequence_shardings(state, mesh)
    except ValueError:  # An axis that so many do not divide.
      continue
    return mesh
  return sharding.mesh(fsdp=1, devices=devices[:1])


def for_decoding(model: Any, params: Any) -> Any:
  """Parameters with matrices in the type of the activations, as all use them.

  What is read for each token is half as long then, and no number changes.
  Starts of memories, norms and gates of heads stay float32, and all of a model
  whose levels learn while it reads.

  Args:
    model: a `LanguageModel`, or one that learns in context.
    params: its weights.
  """
  if not isinstance(model, lm.LanguageModel):
    return params
  dtype = jnp.dtype(model.dtype)

  def one(path: tuple, leaf: jax.Array) -> jax.Array:
    name = sharding.path_name(path)
    matrix = "embed" in sharding.logical_axes(name, leaf.ndim)
    return leaf.astype(dtype) if matrix and dtype != jnp.float32 else leaf

  return jax.tree_util.tree_map_with_path(one, params)


def go_on(
  model: lm.LanguageModel,
  params: Any,
  path: str | os.PathLike,
  *,
  other_weights: bool = False,
) -> tuple[Stream, dict[str, Any]]:
  """A stream that resumes from a memory file, and the file's manifest.

  Args and errors: as of `load_memory`.
  """
  state, logits, manifest = load_memory(
    path, model, params, other_weights=other_weights
  )
  seen = int(np.max(np.asarray(state.position_B)))
  reader = Stream(model, params, state, manifest["slots"], logits, _seen=seen)
  reader.points = _load_points(path, state, manifest)
  return reader, manifest


def save_memory(
  path: str | os.PathLike,
  model: lm.LanguageModel,
  params: Any,
  state: lm.LMState,
  *,
  logits: jax.Array | None = None,
  points: Mapping[str, Point] | None = None,
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
    "slots": _slots(model, state),
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
  leaves = {name: np.asarray(x) for name, x in _named(state)}
  if logits is not None:
    leaves[_LOGITS] = np.asarray(logits)
  for name, point in (points or {}).items():
    of_point = {key: np.asarray(x) for key, x in _named(point.state)}
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
  names = [name for name, _ in _named(like)]
  tree = jax.tree.structure(like)
  state = jax.tree.unflatten(tree, [jnp.asarray(leaves[x]) for x in names])
  return state, logits, manifest


def _load_points(
  path: str | os.PathLike, state: lm.LMState, manifest: Mapping[str, Any]
) -> dict[str, Point]:
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
    arrays = [jnp.asarray(own[key]) for key, _ in _named(state)]
    points[name] = Point(
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
  for name, x in _named(params):
    digest.update(f"{name}\0{x.dtype}{x.shape}\0".encode())
    digest.update(np.ascontiguousarray(np.asarray(x)).tobytes())
  return digest.hexdigest()


def reset(
  model: lm.LanguageModel, params: Any, state: lm.LMState, rows_B: np.ndarray
) -> lm.LMState:
  """Some rows at the start of a sequence; the others bit for bit as they were.

  Args:
    model, params: that the state belongs to.
    state: B rows.
    rows_B: bool, which rows.
  """
  batch = state.position_B.shape[0]
  fresh = model.init_state(params, batch, _slots(model, state))
  chosen_B = jnp.asarray(rows_B, bool)
  if chosen_B.shape != (batch,):
    raise ValueError(f"rows_B must be bool [{batch}], got {chosen_B.shape}")

  def choose(path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    axis = lm.batch_axis(path)
    shape = [1] * old.ndim
    shape[axis] = batch
    return jnp.where(chosen_B.reshape(shape), new, old)

  return jax.tree_util.tree_map_with_path(choose, fresh, state)


def take(state: lm.LMState, rows: np.ndarray) -> lm.LMState:
  """Rows of a state, in the order given; a row may be taken several times."""
  index = jnp.asarray(rows, jnp.int32)
  pick = lambda path, x: jnp.take(x, index, axis=lm.batch_axis(path))
  return jax.tree_util.tree_map_with_path(pick, state)


def clone(state: lm.LMState) -> lm.LMState:
  """A copy with buffers of its own: a stream gives its state's away."""
  return jax.tree.map(jnp.copy, state)


def detach(state: lm.LMState) -> lm.LMState:
  """The same state, through which no gradient flows."""
  return jax.lax.stop_gradient(state)


def _slots(model: lm.LanguageModel, state: lm.LMState) -> int | None:
  """Tokens that an unbounded attention cache has room for."""
  if not model.grows:
    return None
  return max(x.shape[2] for x in jax.tree.leaves(state.layers) if x.ndim > 2)


def _clocks(state: lm.LMState) -> dict[str, list[int]]:
  """Each row's place in the open chunks: of memories, in the first layer."""
  clocks = {}
  for name, leaf in _named(state):
    if name.endswith(("phase", "clock", "phase_B")):
      rows = np.asarray(leaf)
      if name.startswith("layers/"):
        rows = rows[:1].ravel()  # There may be no layer of this kind.
      if rows.size:
        clocks[name] = [int(x) for x in rows]
  return clocks


def _describe(tree: Any) -> dict[str, str]:
  return {name: f"{x.dtype}{list(x.shape)}" for name, x in _named(tree)}


def _named(tree: Any) -> list[tuple[str, Any]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(sharding.path_name(path), x) for path, x in leaves]
