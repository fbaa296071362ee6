"""Kernels of the walks, compiled and checked."""
