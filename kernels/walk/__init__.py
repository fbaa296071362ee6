"""One walk over chunks for every memory, by XLA or as TPU kernels."""

from nl_jax.kernels.walk.affine import Columns as Columns
from nl_jax.kernels.walk.affine import wider as wider
from nl_jax.kernels.walk.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from nl_jax.kernels.walk.api import Call as Call
from nl_jax.kernels.walk.api import default_policy as default_policy
from nl_jax.kernels.walk.api import recorded as recorded
from nl_jax.kernels.walk.api import supports as supports
from nl_jax.kernels.walk.api import walk as walk
from nl_jax.kernels.walk.contract import At as At
from nl_jax.kernels.walk.contract import Body as Body
from nl_jax.kernels.walk.contract import Places as Places
from nl_jax.kernels.walk.contract import State as State
from nl_jax.kernels.walk.contract import from_begins as from_begins
from nl_jax.kernels.walk.pallas import NAMES as NAMES
from nl_jax.kernels.walk.plans import kept as kept
from nl_jax.kernels.walk.products import POLICIES as POLICIES
from nl_jax.kernels.walk.products import Policy as Policy
from nl_jax.kernels.walk.products import Tile as Tile
