"""Titans and the deep memories next to it."""
