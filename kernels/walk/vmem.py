"""How much VMEM a step of a kernel needs, before the compiler says so."""

from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

from nl_jax.kernels.walk import pallas

_LIKE = ("TPU v5e", 128 * 2**20)  # Where no TPU is meant.


def chip() -> tuple[str, int]:
  """Name and VMEM, bytes a core, of the chip that the program is for."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = jax.default_backend() if device is None else device.platform
  if platform != "tpu":
    return _LIKE
  info = pltpu.get_tpu_info()
  return str(info.chip_version), info.vmem_capacity_bytes


def need(how: pallas.How, slow: Any, xs: Any, state: Any, ids: bool) -> int:
  """Bytes of VMEM of a step of the backward kernel, about."""
  return 0
