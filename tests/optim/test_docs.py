"""Every code block of docs/optimizers.md runs, and its lines learn."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

_PAGE = pathlib.Path(__file__).parents[2] / "docs" / "optimizers.md"
_SETUP, *_BLOCKS = re.findall(
  r"^```python\n(.*?)^```", _PAGE.read_text(), re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def problem():
  scope = {}
  with jax.numpy_rank_promotion("allow"):
    exec(_SETUP, scope)
  return scope


@pytest.mark.parametrize("block", _BLOCKS, ids=range(len(_BLOCKS)))
def test_block(block, problem):
  assert len(block.strip().splitlines()) <= 5
  losses = []
  train = problem["train"]

  def recording(*args):
    losses.append(train(*args))
    return losses[-1]

  with jax.numpy_rank_promotion("allow"):
    exec(block, problem | {"train": recording})
  for path in losses:
    assert jnp.isfinite(path).all() and path[-1] < 0.7 * path[0], path[-1]
