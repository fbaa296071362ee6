"""The recurrence of Mamba, a decay for each number of each channel."""

from nl_jax.kernels.selective_scan.api import selective_scan as selective_scan
