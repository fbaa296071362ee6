"""The host's memory: what a step frees is there for the next one."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_… of glibc's malloc.h.


def keep_freed() -> None:
  """Has the C library keep memory that was freed, and map none apart.

  Else the temporaries of a step on a CPU are asked of the system and given
  back each time, and every page is cleared anew: a fifth of the step's time.
  The process stays as large as it was at most. Nothing but glibc is changed.
  """
  if platform.libc_ver()[0] != "glibc":
    return
  mallopt = ctypes.CDLL(None).mallopt
  mallopt(_TRIM_THRESHOLD, 2**31 - 1)
  mallopt(_MMAP_MAX, 0)
