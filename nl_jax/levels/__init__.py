"""Levels: what each is (`LevelRow`), and the runner of those in context."""

from nl_jax.levels.row import NONPARAMETRIC as NONPARAMETRIC
from nl_jax.levels.row import STEP as STEP
from nl_jax.levels.row import LevelRow as LevelRow
from nl_jax.levels.runner import Level as Level
from nl_jax.levels.runner import LevelState as LevelState
from nl_jax.levels.runner import LossFn as LossFn
from nl_jax.levels.runner import Replay as Replay
from nl_jax.levels.runner import State as State
from nl_jax.levels.runner import check as check
from nl_jax.levels.runner import nested_init as nested_init
from nl_jax.levels.runner import nested_scan as nested_scan
from nl_jax.levels.runner import nested_step as nested_step
