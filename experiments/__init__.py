"""The commands: `python -m experiments.<command>`. Flags are read here only."""

import importlib.util
import os
import pathlib

from nl_jax import debugging

_GOOGLE = "0x1ae0"  # Vendor of a TPU on the PCI bus.


def _has_tpu() -> bool:
  """Whether a device of a TPU's maker is on this machine's bus."""
  vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
  return any(path.read_text().strip() == _GOOGLE for path in vendors)


# XLA logs as an error that a compilation takes more than two minutes. What does
# go wrong is raised besides; 0 shows all of the log.
if not debugging.on():
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# With libtpu installed and no TPU, for compiling ahead of time, JAX would look
# for one and print pages of what it did not find.
if (
  "JAX_PLATFORMS" not in os.environ
  and importlib.util.find_spec("libtpu") is not None
  and not _has_tpu()
  and not pathlib.Path("/dev/nvidia0").exists()
):
  os.environ["JAX_PLATFORMS"] = "cpu"
