"""Fused operations; installed and imported only as `nl_jax.kernels`."""
