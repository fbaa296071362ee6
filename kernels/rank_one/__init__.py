"""Rank-one memory: token reference and exact chunk form."""

from nl_jax.kernels.rank_one.api import rank_one as rank_one
