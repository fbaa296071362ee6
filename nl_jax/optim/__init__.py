"""Deep optimizers of Nested Learning as optax gradient transformations.

Directions have the sign of the gradient, as in optax; matrices are (fan-in,
fan-out), as in Flax. Needs only jax, optax and numpy. `scale_by_x` is a rule
without a learning rate, `x` the complete optimizer.
"""

from nl_jax.kernels.delta_dense import delta_dense as delta_dense
from nl_jax.kernels.delta_dense import delta_dot_general as delta_dot_general
from nl_jax.kernels.delta_dense import delta_prox as delta_prox
from nl_jax.kernels.orthogonalize import NS_COEFFS as NS_COEFFS
from nl_jax.kernels.orthogonalize import NSSharding as NSSharding
from nl_jax.kernels.orthogonalize import orthogonalize as orthogonalize
from nl_jax.kernels.orthogonalize import (
  orthogonalize_tree as orthogonalize_tree,
)
from nl_jax.optim._adam_memory import (
  ScaleByAdagradMemoryState as ScaleByAdagradMemoryState,
)
from nl_jax.optim._adam_memory import (
  ScaleByAdamMemoryState as ScaleByAdamMemoryState,
)
from nl_jax.optim._adam_memory import adagrad_memory as adagrad_memory
from nl_jax.optim._adam_memory import adam_memory as adam_memory
from nl_jax.optim._adam_memory import (
  scale_by_adagrad_memory as scale_by_adagrad_memory,
)
from nl_jax.optim._adam_memory import (
  scale_by_adam_memory as scale_by_adam_memory,
)
from nl_jax.optim._deep_momentum import LinearMemory as LinearMemory
from nl_jax.optim._deep_momentum import MLPMemory as MLPMemory
from nl_jax.optim._deep_momentum import (
  ScaleByDeepMomentumState as ScaleByDeepMomentumState,
)
from nl_jax.optim._deep_momentum import deep_momentum as deep_momentum
from nl_jax.optim._deep_momentum import (
  scale_by_deep_momentum as scale_by_deep_momentum,
)
from nl_jax.optim._delta_gradient import delta_gradient as delta_gradient
from nl_jax.optim._delta_gradient import (
  scale_by_delta_gradient as scale_by_delta_gradient,
)
from nl_jax.optim._delta_momentum import (
  ScaleByDeltaMomentumState as ScaleByDeltaMomentumState,
)
from nl_jax.optim._delta_momentum import delta_momentum as delta_momentum
from nl_jax.optim._delta_momentum import (
  delta_momentum_paper as delta_momentum_paper,
)
from nl_jax.optim._delta_momentum import (
  scale_by_delta_momentum as scale_by_delta_momentum,
)
from nl_jax.optim._dims import scale_by_shape as scale_by_shape
from nl_jax.optim._dtypes import StateDtypes as StateDtypes
from nl_jax.optim._m3 import ScaleByM3State as ScaleByM3State
from nl_jax.optim._m3 import m3 as m3
from nl_jax.optim._m3 import m3_paper as m3_paper
from nl_jax.optim._m3 import muon as muon
from nl_jax.optim._m3 import scale_by_m3 as scale_by_m3
from nl_jax.optim._matrices import DEFAULT_EXCLUDE as DEFAULT_EXCLUDE
from nl_jax.optim._matrices import DEFAULT_RULES as DEFAULT_RULES
from nl_jax.optim._matrices import DENSE_GENERAL_RULES as DENSE_GENERAL_RULES
from nl_jax.optim._matrices import explain_matrices as explain_matrices
from nl_jax.optim._matrices import (
  matrix_dims_from_paths as matrix_dims_from_paths,
)
from nl_jax.optim._multi_frequency import (
  MultiFrequencyState as MultiFrequencyState,
)
from nl_jax.optim._multi_frequency import cms_periods as cms_periods
from nl_jax.optim._multi_frequency import multi_frequency as multi_frequency
from nl_jax.optim._multi_frequency import reclock_schedule as reclock_schedule
from nl_jax.optim._newton_schulz import NewtonSchulz as NewtonSchulz
from nl_jax.optim._preconditioned import (
  ScaleByFeatureMomentumState as ScaleByFeatureMomentumState,
)
from nl_jax.optim._preconditioned import (
  ScaleByPreconditionedMomentumState as ScaleByPreconditionedMomentumState,
)
from nl_jax.optim._preconditioned import (
  diag_preconditioner as diag_preconditioner,
)
from nl_jax.optim._preconditioned import (
  left_gram_preconditioner as left_gram_preconditioner,
)
from nl_jax.optim._preconditioned import (
  orthogonal_preconditioner as orthogonal_preconditioner,
)
from nl_jax.optim._preconditioned import (
  scale_by_feature_momentum as scale_by_feature_momentum,
)
from nl_jax.optim._preconditioned import (
  scale_by_preconditioned_momentum as scale_by_preconditioned_momentum,
)
from nl_jax.optim._reset_on_slower import (
  ResetOnSlowerState as ResetOnSlowerState,
)
from nl_jax.optim._reset_on_slower import reset_on_slower as reset_on_slower
