"""One model, one state: prefill, decode, sample, save and load a memory.

A stream reads tokens through `LMState`, the state that training uses too, so
what it says equals one call over all tokens. A token costs the same however
many came before, unless the model has an unbounded attention cache.

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax import files, formats, sharding, upgrade
from nl_jax.models import lm

FORMAT = 2  # Of a memory file.
# Fields that change no number, of the model and of all that is in it.
_FREE = ("sequence_length", "remat", "walk")
_KEY = "nl_jax"  # Of the manifest, in the file's metadata.
_LOGITS = "logits"
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
    mesh: of the devices that share the work, or None.
  """

  model: lm.LanguageModel
  params: Any
  state: lm.LMState
  slots: int | None
  logits: jax.Array | None = None
  _seen: int = 0
  mesh: jax.sharding.Mesh | None = None

  def read(self, tokens: np.ndarray) -> jax.Array:
    """Reads tokens [B,T], T >= 1 (prefill); returns the logits after them.

    Raises:
      ValueError: no token, or more than the attention cache has room for.
    """
    with self._where():
      for piece in self._pieces(tokens):
        self.logits, self.state = _read(
          self.model, self.params, piece, self.state
        )
    return self.logits

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
        nats, self.logits, self.state = _score(
          self.model, self.params, piece, self.state, before
        )
      scores.append(np.asarray(nats, np.float32))
    return np.concatenate(scores, axis=1)

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


def for_decoding(model: lm.LanguageModel, params: Any) -> Any:
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
  """A stream that goes on from a memory file, and the file's manifest.

  Args and errors: as of `load_memory`.
  """
  state, logits, manifest = load_memory(
    path, model, params, other_weights=other_weights
  )
  seen = int(np.max(np.asarray(state.position_B)))
  reader = Stream(model, params, state, manifest["slots"], logits, seen)
  return reader, manifest


def save_memory(
  path: str | os.PathLike,
  model: lm.LanguageModel,
  params: Any,
  state: lm.LMState,
  *,
  logits: jax.Array | None = None,
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
    about: JSON values to keep in the manifest.

  Returns:
    The manifest: format, hashes of model and weights, tokens seen by each row,
    clocks by level, leaves, slots of an attention cache, time, `about`.

  Raises:
    ValueError: the path holds something else.
  """
  from safetensors import flax as safetensors

  path = pathlib.Path(path)
  manifest = {
    "format": FORMAT,
    "model": model_hash(model),
    "weights": weights_hash(params),
    "rows": int(state.position_B.shape[0]),
    "slots": _slots(model, state),
    "tokens_seen": [int(x) for x in np.asarray(state.position_B)],
    "clocks": _clocks(state),
    "leaves": _describe(state),
    "time": round(time.time(), 3),
    "about": dict(about or {}),
  }
  if path.exists():
    before = read_manifest(path)
    if before["model"] != manifest["model"]:
      raise ValueError(
        f"{path} holds the memory of another model; give another file"
      )
  leaves = {name: jnp.asarray(x) for name, x in _named(state)}
  if logits is not None:
    leaves[_LOGITS] = logits
  content = safetensors.save(leaves, {_KEY: json.dumps(manifest)})
  files.write(path, content)
  return manifest


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
    ValueError: no memory file, a torn one, or one of another model or weights.
  """
  from safetensors import flax as safetensors

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
  leaves = safetensors.load(pathlib.Path(path).read_bytes())
  like = jax.eval_shape(
    lambda p: model.init_state(p, manifest["rows"], manifest["slots"]), params
  )
  logits = leaves.pop(_LOGITS, None)
  if manifest["format"] == 1:
    _check_leaves(path, leaves, manifest["leaves"])
    leaves = upgrade.memory(leaves, model, params)
  _check_leaves(path, leaves, _describe(like))
  names = [name for name, _ in _named(like)]
  tree = jax.tree.structure(like)
  state = jax.tree.unflatten(tree, [leaves[name] for name in names])
  return state, logits, manifest


def _check_leaves(
  path: str | os.PathLike,
  leaves: Mapping[str, jax.Array],
  wanted: Mapping[str, str],
) -> None:
  """Raises ValueError for arrays of other names, types or shapes."""
  found = {k: f"{x.dtype}{list(x.shape)}" for k, x in leaves.items()}
  wrong = [
    f"{k} is {found.get(k, 'missing')}, expected {wanted.get(k, 'nothing')}"
    for k in sorted({*found, *wanted})
    if found.get(k) != wanted.get(k)
  ]
  if wrong:
    raise ValueError(f"{path} does not fit this model: {'; '.join(wrong[:5])}")


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
      metadata = file.metadata() or {}
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} is no memory file, or a torn one ({error})"
    ) from error
  if _KEY not in metadata:
    raise ValueError(f"{path} is a safetensors file but no memory")
  manifest = json.loads(metadata[_KEY])
  otherwise = "read the text again with the command that wrote the file"
  formats.check(path, "a memory", manifest.get("format"), FORMAT, otherwise)
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
  rows_B = jnp.asarray(rows_B, bool)
  if rows_B.shape != (batch,):
    raise ValueError(f"rows_B must be bool [{batch}], got {rows_B.shape}")

  def choose(path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    axis = _batch_axis(path)
    shape = [1] * old.ndim
    shape[axis] = batch
    return jnp.where(rows_B.reshape(shape), new, old)

  return jax.tree_util.tree_map_with_path(choose, fresh, state)


def take(state: lm.LMState, rows: np.ndarray) -> lm.LMState:
  """Rows of a state, in the order given; a row may be taken several times."""
  rows = jnp.asarray(rows, jnp.int32)
  pick = lambda path, x: jnp.take(x, rows, axis=_batch_axis(path))
  return jax.tree_util.tree_map_with_path(pick, state)


def clone(state: lm.LMState) -> lm.LMState:
  """A copy with buffers of its own: a stream gives its state's away."""
  return jax.tree.map(jnp.copy, state)


def detach(state: lm.LMState) -> lm.LMState:
  """The same state, through which no gradient flows."""
  return jax.lax.stop_gradient(state)


def _batch_axis(path: Any) -> int:
  """Leaves of layers are [L,B,...], the others [B,...]."""
  return 1 if path[0].name == "layers" else 0


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
