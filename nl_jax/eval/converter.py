"""Rows of a task as what a model reads; needs the extra `eval`."""

from collections.abc import Mapping
from typing import Any, ClassVar

import seqio
import tensorflow as tf


class ScoringFeatureConverter(seqio.FeatureConverter):
  """Inputs and targets, one after the other, without anything between.

  With n + 1 tokens in a row and k of them targets: input t[:-1], labels t[1:],
  weights n - k zeros and k ones, padded with 0 on the right.
  """

  TASK_FEATURES = {
    "inputs": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
    "targets": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
  }
  MODEL_FEATURES = {
    "decoder_input_tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
    "decoder_target_tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
    "decoder_loss_weights": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
  }
  PACKING_FEATURE_DTYPES: ClassVar[dict[str, Any]] = {}

  def __init__(self, max_length: int):
    """Args: the longest row that a model reads, in tokens."""
    super().__init__(pack=False)
    self._max_length = max_length

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    length = self._length(task_feature_lengths)

    def convert(row: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
      tokens = tf.concat([row["inputs"], row["targets"]], axis=0)
      targets = tf.size(row["targets"])
      size = tf.size(tokens) - 1
      weights = tf.cast(tf.range(size) >= size - targets, tf.int32)
      made = {
        "decoder_input_tokens": tokens[:-1],
        "decoder_target_tokens": tokens[1:],
        "decoder_loss_weights": weights,
      }
      pad = [[0, length - size]]
      return {
        name: tf.ensure_shape(tf.pad(x, pad), [length])
        for name, x in made.items()
      }

    return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

  def get_model_feature_lengths(
    self, task_feature_lengths: Mapping[str, int]
  ) -> Mapping[str, int]:
    """The same length for all features."""
    length = self._length(task_feature_lengths)
    return dict.fromkeys(self.MODEL_FEATURES, length)

  def _length(self, task_feature_lengths: Mapping[str, int]) -> int:
    """Inputs and targets are measured apart, so that their sum is too long."""
    longest = (
      task_feature_lengths["inputs"] + task_feature_lengths["targets"] - 1
    )
    return min(longest, self._max_length)
