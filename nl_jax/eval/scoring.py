"""Log-likelihoods of rows: bucketed by length, sharded over all devices.

    ll_b = sum_t w_bt (logits_bt[label_bt] - logsumexp(logits_bt))

Every row starts from the model's trained initial state, and carries nothing to
another. What a row scores depends on no other row, and not on the padding
after it. The scorer is given tokens: it knows no document and no answer.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nl_jax import sharding
from nl_jax.models import lm

MEMORISE = ("none", "prompt")
_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)  # Then doubles of the last.
# Batches that are computed while an earlier one is read back.
_AHEAD = 2

Pair = tuple[np.ndarray, np.ndarray]  # (inputs, targets) of a row, int32.
Progress = Callable[[int, int], None]  # (rows done, rows of the task).


class Scores(NamedTuple):
  """What rows scored, in their order.

  Attributes:
    lls: nats of all targets of a row, negative.
    is_greedy: whether each target was the most likely token.
  """

  lls: list[float]
  is_greedy: list[bool]


class _Batch(NamedTuple):
  """Rows of one shape; those beyond `rows` are dummies.

  Attributes:
    rows: numbers of the rows.
    inputs, labels: int32 [B,T].
    weights: float32 [B,T], 1 at targets.
    segment_ids: int32 [B,T], 0 after the end of a row.
  """

  rows: list[int]
  inputs: np.ndarray
  labels: np.ndarray
  weights: np.ndarray
  segment_ids: np.ndarray


class Scorer:
  """Scores rows with a model."""

  def __init__(
    self,
    model: lm.LanguageModel,
    vocab_size: int,
    mesh: jax.sharding.Mesh,
    *,
    batch_tokens: int = 65536,
    memorise: str = "none",
  ):
    """Binds a model to the devices.

    Args:
      model: a `LanguageModel`, with the chunk lengths of its training.
      vocab_size: ids of the tokenizer; the model's further ones have no
        probability.
      mesh: of `sharding.mesh`.
      batch_tokens: B * T of a batch, at most.
      memorise: "prompt" lets levels that learn from the task loss learn from
        the tokens before the first target; "none" keeps them as they are.

    Raises:
      ValueError: a value out of range, or more ids than the model has.
    """
    if vocab_size > model.vocab_size:
      raise ValueError(
        f"the tokenizer has {vocab_size} ids and the model only "
        f"model.vocab_size={model.vocab_size}; give the tokenizer that it was "
        "trained with"
      )
    if memorise not in MEMORISE:
      raise ValueError(f"memorise must be none or prompt, got {memorise!r}")
    if batch_tokens < 1:
      raise ValueError(f"batch_tokens must be >= 1, got {batch_tokens}")
    self.mesh = mesh
    self._tokens = batch_tokens
    self._rows = mesh.shape["replica"] * mesh.shape["fsdp"]
    # Whole chunks, and the same number of tokens on each device.
    self._multiple = np.lcm(model.alignment, mesh.shape["sequence"])
    self._score = jax.jit(
      functools.partial(score, model, vocab_size, memorise),
      out_shardings=sharding.replicated(mesh),
    )
    self.shapes: set[tuple[int, int]] = set()  # That were scored.

  def __call__(
    self,
    params: Any,
    pairs: Sequence[Pair],
    progress: Progress | None = None,
  ) -> Scores:
    """Scores rows; on several processes all get all scores.

    Args:
      params: of the model, on the mesh.
      pairs: (inputs, targets) of each row, in any order.
      progress: called with the number of rows done.
    """
    scores = Scores([0.0] * len(pairs), [False] * len(pairs))
    waiting: list[tuple[list[int], tuple[jax.Array, jax.Array]]] = []
    done = 0
    with jax.set_mesh(self.mesh):
      for batch in self._batches(pairs):
        waiting.append((batch.rows, self._dispatch(params, batch)))
        if len(waiting) > _AHEAD:
          done += _collect(*waiting.pop(0), scores)
          if progress:
            progress(done, len(pairs))
    for rows, out in waiting:
      done += _collect(rows, out, scores)
    if progress:
      progress(done, len(pairs))
    return scores

  def _dispatch(
    self, params: Any, batch: _Batch
  ) -> tuple[jax.Array, jax.Array]:
    by_batch = sharding.batch_sharding(self.mesh)
    self.shapes.add(batch.inputs.shape)
    # Each process holds all rows and gives its devices theirs.
    put = lambda x: jax.make_array_from_callback(
      x.shape, by_batch, lambda where: x[where]
    )
    return self._score(params, *map(put, batch[1:]))

  def _batches(self, pairs: Sequence[Pair]) -> Iterator[_Batch]:
    """The same batches in the same order on all processes."""
    lengths = [len(inputs) + len(targets) - 1 for inputs, targets in pairs]
    buckets: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
      buckets.setdefault(self._padded(length), []).append(i)
    for length, rows in sorted(buckets.items()):
      size = self._batch_size(length, len(rows))
      for at in range(0, len(rows), size):
        chosen = rows[at : at + size]
        yield _batch(chosen, [pairs[i] for i in chosen], size, length)

  def _padded(self, length: int) -> int:
    bucket = next((b for b in _BUCKETS if b >= length), _BUCKETS[-1])
    while bucket < length:
      bucket *= 2
    return -(-bucket // self._multiple) * self._multiple

  def _batch_size(self, length: int, rows: int) -> int:
    """A power of two of rows a device, so that few shapes compile."""
    most = max(1, self._tokens // length // self._rows)
    wanted = 1
    while wanted * self._rows < rows and 2 * wanted <= most:
      wanted *= 2
    return wanted * self._rows


def score(
  model: lm.LanguageModel,
  vocab_size: int,
  memorise: str,
  params: Any,
  inputs_BxT: jax.Array,
  labels_BxT: jax.Array,
  weights_BxT: jax.Array,
  segment_ids_BxT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Sums of log-likelihoods [B], and whether all targets were greedy [B].

  Args:
    model, vocab_size, memorise: as of `Scorer`.
    params: of the model.
    inputs_BxT, labels_BxT: int32; labels are the next tokens.
    weights_BxT: 1 at targets, else 0.
    segment_ids_BxT: 1 at tokens, 0 at padding.
  """
  read_BxT = (segment_ids_BxT > 0).astype(weights_BxT.dtype)
  # What learns from the task loss never sees the answer's.
  learn = memorise == "prompt"
  logits, _, _ = model.apply(
    params,
    inputs_BxT,
    segment_ids=segment_ids_BxT,
    learn=(read_BxT - weights_BxT) * learn,
  )
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  if vocab_size < model.vocab_size:
    known = jnp.arange(model.vocab_size) < vocab_size
    logits = jnp.where(known[None, None], logits, -jnp.inf)
  chosen = jnp.take_along_axis(logits, labels_BxT[..., None], axis=-1)[..., 0]
  asked = weights_BxT > 0
  lls = jnp.where(asked, chosen - jax.nn.logsumexp(logits, axis=-1), 0)
  greedy = jnp.where(asked, jnp.argmax(logits, axis=-1) == labels_BxT, True)
  return jnp.sum(lls, axis=1), jnp.all(greedy, axis=1)


def _batch(
  rows: list[int], pairs: Sequence[Pair], size: int, length: int
) -> _Batch:
  """Rows padded on the right, and dummies of weight 0 below them."""
  inputs = np.zeros((size, length), np.int32)
  labels, segments = np.zeros_like(inputs), np.zeros_like(inputs)
  weights = np.zeros((size, length), np.float32)
  for i, (context, targets) in enumerate(pairs):
    tokens = np.concatenate([context, targets])
    end = len(tokens) - 1
    inputs[i, :end], labels[i, :end] = tokens[:-1], tokens[1:]
    weights[i, end - len(targets) : end] = 1
    segments[i, :end] = 1
  return _Batch(rows, inputs, labels, weights, segments)


def _collect(
  rows: list[int], out: tuple[jax.Array, jax.Array], scores: Scores
) -> int:
  """Writes a batch's scores to the places of its rows; dummies have none."""
  lls, greedy = (np.asarray(x)[: len(rows)].tolist() for x in out)
  for i, ll, is_greedy in zip(rows, lls, greedy):
    scores.lls[i], scores.is_greedy[i] = ll, is_greedy
  return len(rows)
