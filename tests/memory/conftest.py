"""Shapes of what these tests call are checked."""

from tests.legend import shapes  # noqa: F401
