"""The rates of a chunk's tokens."""

from typing import NamedTuple

import jax

SHARED = ("write", "decayed")


class Rates(NamedTuple):
  """What every token of a chunk does to a memory, columns [..., C, 1].

  Rates are already proximal. A masked token is an exact no-op.

  Attributes:
    log_alpha: log of the retention, <= 0.
    log_beta: log of the momentum decay, <= 0; None without momentum.
    write: write rate.
    erase: erase rate; "write": the write rate; "decayed": alpha times that,
      the gated delta rule; None: nothing is erased.
    mask: 1 for real tokens, 0 for the others; bool or float.
  """

  log_alpha: jax.Array
  log_beta: jax.Array | None
  write: jax.Array
  erase: jax.Array | str | None
  mask: jax.Array
