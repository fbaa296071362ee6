"""Rank-one memory: token reference and exact chunk form."""

from nl_jax.kernels.rank_one.api import ERASES as ERASES
from nl_jax.kernels.rank_one.api import READS as READS
from nl_jax.kernels.rank_one.api import Rates as Rates
from nl_jax.kernels.rank_one.api import rank_one as rank_one
from nl_jax.kernels.rank_one.xla import Chunk as Chunk
from nl_jax.kernels.rank_one.xla import Tokens as Tokens
from nl_jax.kernels.rank_one.xla import recall as recall
