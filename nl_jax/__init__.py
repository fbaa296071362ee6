"""Nested Learning in JAX (Behrouz et al., NeurIPS 2025, arXiv 2512.24695).

A model, its optimizer and its memories are one system of *levels*, each with
its own state, context flow, objective, learning rule and period. The rooms:
`memory` (what learns while it reads), `optim` (what learns from gradients),
`models` (slow weights), `levels` (the runner), `train`, `data`, `stream`.
Importing this package loads neither TensorFlow nor grain and touches no device.
"""

__version__ = "0.1.0"
