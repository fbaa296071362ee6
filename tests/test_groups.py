"""Tests that share what is expensive run on one worker of pytest-xdist."""

import pytest


@pytest.mark.xdist_group("together")
def test_groups_reach_the_scheduler(request):
  # Some versions of pytest lose the mark in silence: everything is then
  # compiled and trained once a worker.
  if hasattr(request.config, "workerinput"):
    assert request.node.nodeid.endswith("@together")
