"""Our tokenizers as `seqio.Vocabulary`; needs the extra `eval`."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from nl_jax.eval import special


class Vocabulary(seqio.Vocabulary):
  """A tokenizer of `nl_jax.data.tokenizers`, id for id.

  Bytes equal `seqio.ByteVocabulary`, SentencePiece models
  `seqio.SentencePieceVocabulary(file, extra_ids=0)`.
  """

  def __init__(self, tokenizer: Any):
    super().__init__(extra_ids=0)
    self._tokenizer = tokenizer
    self._ids = special.ids(tokenizer)

  @property
  def bos_id(self) -> int | None:
    """The beginning of a sequence; None where the tokenizer has none."""
    return self._ids.bos

  @property
  def eos_id(self) -> int:
    """The end of a document."""
    return self._tokenizer.end_id

  @property
  def unk_id(self) -> int | None:
    """What unknown text becomes; None where every text is known."""
    return self._ids.unknown

  @property
  def _base_vocab_size(self) -> int:
    return self._tokenizer.vocab_size

  def _encode(self, s: str) -> list[int]:
    return self._tokenizer.encode(s).tolist()

  def _decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encode(text: Any) -> np.ndarray:
      # Bytes, or an array of no axes that holds them.
      content = np.asarray(text, object).item()
      return self._tokenizer.encode(content.decode("utf-8"))

    ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
    ids.set_shape([None])
    return ids

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(row: Iterable[int]) -> bytes:
      return self._tokenizer.decode(row).encode("utf-8")

    text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    text.set_shape([])
    return text
