"""Weights that stay on a simplex: token reference and exact chunk form."""

from nl_jax.kernels.simplex.api import simplex as simplex
