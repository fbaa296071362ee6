"""The delta rule with a decay for each channel and an erase of its own."""

from nl_jax.kernels.general_delta_rule.api import (
  general_delta_rule as general_delta_rule,
)
