"""Test set-up: eight CPU devices, strict broadcasting, a compilation cache.

Most of the suite's time is compiling, so code is optimised little, and what
was compiled is kept; commands that tests start inherit all of it.
"""

import gc
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A program as one piece, without MLIR's fusions: compiled in half the time.
# An XLA that lacks the second option ignores it.
os.environ["XLA_FLAGS"] = (
  "--xla_cpu_parallel_codegen_split_count=1 "
  "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
os.environ.setdefault(
  "NL_TEST_CACHE", os.path.join(tempfile.gettempdir(), "nl_jax_test_cache")
)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ["NL_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
# Tracing makes much that lives on: Python need not look through it so often.
gc.set_threshold(50_000, 20, 100)


# Rooms and files of the tier `-m quick`: under five minutes on two cores.
QUICK = (
  "data", "memory", "optim", "tasks", "test_card.py", "test_fields.py",
  "test_files.py", "test_groups.py", "test_imports.py", "test_levels.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Marks the tests of `QUICK`."""
  here = pathlib.Path(__file__).parent
  for item in items:
    if item.path.relative_to(here).parts[0] in QUICK:
      item.add_marker(pytest.mark.quick)


def pytest_runtest_teardown(
  item: pytest.Item, nextitem: pytest.Item | None
) -> None:
  """Lets go of what a module compiled: a process would grow by gigabytes."""
  if nextitem is None or nextitem.path != item.path:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
  """The folder of real test data, named by the variable NL_DATA."""
  path = os.environ.get("NL_DATA")
  if not path:
    pytest.skip("NL_DATA is not set: the folder of real test data")
  return pathlib.Path(path).resolve()
