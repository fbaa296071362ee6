"""A slow run of the stub, to be killed: python -m tests.train.victim <dir>."""

import sys
import time

import numpy as np

from nl_jax.train import checkpoint
from tests.train import stub

STEPS = 30


def main(workdir: str) -> None:
  """Trains, and writes the final parameters beside the run."""
  model = stub.Model((stub.TOKENS, 4 * stub.TOKENS))
  stub.run(
    workdir,
    model=model,
    data=stub.Data(hook=lambda i: time.sleep(0.04)),
    evaluate=stub.evaluate,
    steps=STEPS,
    eval_every=4,
    checkpoint_every=3,
    log_every=1,
  )
  params, _ = checkpoint.load_params(workdir, model)
  np.savez(workdir + "_final.npz", **params["blocks"]["cms"]["mid"])


if __name__ == "__main__":
  main(sys.argv[1])
