"""Softmax attention, whole or in a window."""
