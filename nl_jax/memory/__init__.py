"""Memories: what learns from tokens, as pure functions on NamedTuples."""
