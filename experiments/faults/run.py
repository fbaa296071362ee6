"""One start of a run that faults are done to: `experiments.lm`, by itself.

    python -m experiments.faults.run <batch> --config=... --workdir=...

It trains as `experiments.lm` does, and leaves out the sample and the report at
the end. Batch number <batch> of the data has a weight that is not a number;
-1: none has.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments.cli import command


class _Poisoned:
  """Data with one batch that is not finite; otherwise what it is given."""

  def __init__(self, data: Any, batch: int, batch_size: int):
    self._data, self._batch, self._size = data, batch, batch_size
    self.get_state, self.set_state = data.get_state, data.set_state

  def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
    return self

  def __next__(self) -> Mapping[str, np.ndarray]:
    number = self.get_state()["next_row"] // self._size
    rows = next(self._data)
    if number != self._batch:
      return rows
    weights_BxT = np.array(rows["weights"])
    weights_BxT[0, 0] = np.nan
    return {**rows, "weights": weights_BxT}


def main(batch: int) -> int:
  """Trains, with a batch that is not finite; returns the exit status."""
  # Imported here, as in lm: from now on Ctrl-C is answered.
  import jax

  from experiments import lm
  from nl_jax.train import loop

  train = loop.train

  def poisoned(*, data: Any, batch_size: int, **arguments: Any) -> loop.Result:
    # Small programs are compiled once too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    data = _Poisoned(data, batch, batch_size)
    return train(data=data, batch_size=batch_size, **arguments)

  loop.train = poisoned
  lm._finish = lambda *result: None
  return lm.main()


if __name__ == "__main__":
  import experiments.lm  # noqa: F401  Defines its flags.

  number = int(sys.argv.pop(1))
  command.run(lambda: main(number))
