"""Deep optimizers of Nested Learning as optax gradient transformations.

Directions have the sign of the gradient, as in optax; matrices are (fan-in,
fan-out), as in Flax. Needs only jax, optax and numpy.
"""

from nl_jax.optim._multi_frequency import (
  MultiFrequencyState as MultiFrequencyState,
)
from nl_jax.optim._multi_frequency import cms_periods as cms_periods
from nl_jax.optim._multi_frequency import multi_frequency as multi_frequency
from nl_jax.optim._multi_frequency import reclock_schedule as reclock_schedule
from nl_jax.optim._reset_on_slower import (
  ResetOnSlowerState as ResetOnSlowerState,
)
from nl_jax.optim._reset_on_slower import reset_on_slower as reset_on_slower
