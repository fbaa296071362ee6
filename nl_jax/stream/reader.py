"""One model, one state: prefill, decode, sample.

A stream reads tokens through `LMState`, the state that training uses too, so
what it says equals one call over all tokens. A token costs the same however
many came before, unless the model has an unbounded attention cache.

What it remembers can be rolled back to a named point, and can be given a bound
on how far it may move from one.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from nl_jax import sharding
from nl_jax.models import lm
from nl_jax.stream import drift, memory_file, states

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
    points: what `mark` kept, by name.
    stopped_B: bool, rows that write no more; None without a bound.
    mesh: of the devices that share the work, or None.
  """

  model: lm.LanguageModel
  params: Any
  state: lm.LMState
  slots: int | None
  logits: jax.Array | None = None
  points: dict[str, states.Point] = dataclasses.field(default_factory=dict)
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
    self.points[name] = states.Point(
      states.clone(self.state), self.logits, self._seen, dict(about or {})
    )

  def roll_back(self, name: str) -> states.Point:
    """Goes back to a point: all that was read since then is forgotten.

    Raises:
      ValueError: no point of that name.
    """
    point = self._point(name)
    self.state, self.logits = states.clone(point.state), point.logits
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

  def _point(self, name: str) -> states.Point:
    if name not in self.points:
      known = ", ".join(self.points) or "none"
      raise ValueError(f"the memory has no point {name!r}; it has: {known}")
    return self.points[name]

  def _held(self) -> lm.LMState | None:
    """A copy to go back to; None where nothing is bounded."""
    return states.clone(self.state) if self._bound else None

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
  shardings = sharding.decode_shardings(params, model.axes(), mesh)
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
      sharding.decode_shardings(params, model.axes(), mesh)
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
  dtype, axes = jnp.dtype(model.dtype), model.axes()

  def one(path: tuple, leaf: jax.Array) -> jax.Array:
    matrix = "embed" in axes[sharding.path_name(path)]
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

  Args and errors: as of `memory_file.load_memory`.
  """
  state, logits, manifest = memory_file.load_memory(
    path, model, params, other_weights=other_weights
  )
  seen = int(np.max(np.asarray(state.position_B)))
  reader = Stream(model, params, state, manifest["slots"], logits, _seen=seen)
  reader.points = memory_file.load_points(path, state, manifest)
  return reader, manifest
