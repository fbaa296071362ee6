"""Speed and memory as ratios of one run on this machine.

    python -m experiments.bench [--suite=memories,steps] [--output=bench.json]

Compared functions are timed in turns, several times, and their least times
divided: only such ratios mean something, and they are noisy. Times of a chip
that is not here are never given.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from experiments.cli import command

_ROUNDS = 5
_QUICK = flags.DEFINE_boolean(
  "quick", False, "Of the suites gpu and tpu: smallest sizes, on any device."
)
_SECONDS = flags.DEFINE_float(
  "seconds", 480.0, "Of the suites gpu and tpu: nothing begins after these.",
  lower_bound=1.0,
)  # fmt: skip
_OUTPUT = flags.DEFINE_string("output", "", "Also write the rows as JSON here.")


def least_seconds(functions: Mapping[str, Callable[[], Any]]) -> dict:
  """Least seconds of each function, timed in turns after a warm-up."""
  import jax

  for function in functions.values():
    jax.block_until_ready(function())
  least = dict.fromkeys(functions, float("inf"))
  for _ in range(_ROUNDS):
    for name, function in functions.items():
      begin = time.perf_counter()
      jax.block_until_ready(function())
      least[name] = min(least[name], time.perf_counter() - begin)
  return least


def _gradient(config: Any, implementation: str) -> Callable[[], Any]:
  """One outer gradient through self-modifying Titans, T 512 B 4 H 4 K 64."""
  import jax
  import jax.numpy as jnp

  from nl_jax import memory
  from nl_jax.memory import self_modifying

  B, T, H, K = 4, 512, 4, 64
  params = self_modifying.init(jax.random.key(0), config, H, K)
  z = tuple(jax.random.normal(jax.random.key(1), (3, B, T, H, K)))

  @jax.jit
  def grad(params, z):
    def loss(params, z):
      y, _, _ = self_modifying.update(
        params, self_modifying.start(params, B, config), *z,
        options=config, run=memory.Run(implementation), at_edge=True,
      )  # fmt: skip
      return jnp.sum(jnp.square(y))

    return jax.grad(loss, (0, 1))(params, z)

  return lambda: grad(params, z)


def memories() -> list[dict]:
  """Chunk form against the token loop: linear >= 4x, MLP >= 6x."""
  from nl_jax.memory import self_modifying

  titans = self_modifying.Options()
  linear = self_modifying.Options(
    memory="linear", objective="dot", dgd_coef="raw", residual=False,
    residual_clip=0.0, adaptive=(),
  )  # fmt: skip
  rows = []
  for name, config, target in (
    ("linear memory", linear, 4.0),
    ("self-modifying Titans, MLP memories", titans, 6.0),
  ):
    times = least_seconds(
      {i: _gradient(config, i) for i in ("reference", "xla")}
    )
    rows.append(
      dict(
        what=f"gradient, {name}: token loop / chunk form",
        ratio=times["reference"] / times["xla"],
        target=f">= {target:g}",
      )
    )
  return rows


def _stepper(name: str, change: Callable[[Any], None] | None = None) -> Any:
  from experiments.bench import steps as steps_lib

  return steps_lib.Stepper(steps_lib.tiny(name, change))


def steps() -> list[dict]:
  """A train step of each tiny config against Transformer++'s."""
  names = ("transformer", "hope_attention", "hope_linear", "hope")
  times = least_seconds({n: _stepper(f"{n}_tiny") for n in names})
  return [
    dict(
      what=f"train step, {name}_tiny / transformer_tiny, equal parameters",
      ratio=times[name] / times["transformer"],
      target="reported",
    )
    for name in names[1:]
  ]


def temporaries() -> list[dict]:
  """Temporary bytes of the gradient against remat groups and length.

  The saved states are (N/g + g) copies of the fast weights (docs/mathematics.md
  2.6).
  """
  import jax
  import jax.numpy as jnp

  from nl_jax.memory import self_modifying

  B, H, K = 2, 4, 64

  def measured(T: int, group: int) -> tuple[int, int]:
    config = self_modifying.Options(remat_group=group)
    params = self_modifying.init(jax.random.key(0), config, H, K)
    z = jax.ShapeDtypeStruct((B, T, H, K), jnp.float32)

    def loss(params, *z):
      start = self_modifying.start(params, B, config)
      y, _, _ = self_modifying.update(
        params, start, *z, config=config, at_edge=True
      )
      return jnp.sum(jnp.square(y))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(params, z, z, z)
    used = compiled.compile().memory_analysis().temp_size_in_bytes
    roles = len(config.generator_roles) + 1
    chunks = T // config.chunk_memory
    saved = B * H * roles * 2 * K * K * 4 * (chunks // group + group)
    return used, saved

  rows = []
  for T, group in ((1024, 1), (1024, 4), (1024, 8), (4096, 8), (4096, 16)):
    used, saved = measured(T, group)
    rows.append(
      dict(
        what=f"temporaries of the gradient, T {T}, groups of {group}: "
        f"{used / 2**20:.0f} MiB / formula of 2.6 ({saved / 2**20:.0f} MiB)",
        ratio=used / saved,
        target="reported",
      )
    )
  return rows


def compile_seconds() -> list[dict]:
  """CPU seconds of compiling the tiny train step; at most 40."""
  import jax

  jax.config.update("jax_enable_compilation_cache", False)
  rows = []
  for name in ("hope_tiny", "hope_linear_tiny", "transformer_tiny"):
    rows.append(
      dict(
        what=f"CPU seconds to trace and compile the train step, {name}",
        ratio=_stepper(name).compile_seconds,
        target="<= 40",
      )
    )
  return rows


def optimizers() -> list[dict]:
  """One update of 10M parameters, as ratios (docs/optimizers.md)."""
  from experiments.bench import optimizers as optimizers_lib

  return optimizers_lib.run()


def data() -> list[dict]:
  """Preparing a corpus, and reading it while training."""
  from experiments.bench import data as data_lib

  return data_lib.run(_stepper("hope_tiny"), 256, 8)


def eval_() -> list[dict]:
  """Scoring against training's forward pass; data sets of a full run."""
  from experiments.bench import eval

  return eval.run(least_seconds)


def incontext() -> list[dict]:
  """A train step of levels that learn in context against the plain chain."""
  from experiments.bench import incontext as incontext_lib

  return incontext_lib.steps(_stepper, least_seconds)


def decode() -> list[dict]:
  """A decoded token after a short and a long text."""
  from experiments.bench import incontext as incontext_lib

  return incontext_lib.decode(least_seconds)


def mixers() -> list[dict]:
  """Each mixer against Transformer++ from 512 to 16K tokens, and a plot."""
  from experiments.bench import mixers as mixers_lib

  return mixers_lib.run(least_seconds, _OUTPUT.value)


def gpu() -> list[dict]:
  """Mixers and train steps of the 340M models (docs/performance.md)."""
  return _device("gpu")


def tpu() -> list[dict]:
  """What `gpu` measures, on a TPU."""
  return _device("tpu")


def _device(platform: str) -> list[dict]:
  from experiments.bench import device

  return device.run(
    platform, least_seconds, _QUICK.value, _SECONDS.value, _OUTPUT.value
  )


SUITES = {
  "memories": memories,
  "steps": steps,
  "temporaries": temporaries,
  "compile": compile_seconds,
  "optimizers": optimizers,
  "data": data,
  "eval": eval_,
  "incontext": incontext,
  "decode": decode,
  "mixers": mixers,
  "gpu": gpu,
  "tpu": tpu,
}
_SUITE = flags.DEFINE_list(
  "suite", ["memories", "steps", "temporaries", "compile"],
  f"Any of {', '.join(SUITES)}.",
)  # fmt: skip


def main() -> int:
  """Runs the command; returns its exit status."""
  unknown = [name for name in _SUITE.value if name not in SUITES]
  if unknown:
    raise ValueError(
      f"unknown suite {unknown[0]!r}; known: {', '.join(SUITES)}"
    )
  import jax

  from nl_jax.train import heap

  heap.keep_freed()  # As in training.
  about = dict(
    jax=jax.__version__,
    device=str(jax.devices()[0].device_kind),
    cores=len(os.sched_getaffinity(0)),
    machine=platform.machine(),
  )
  print(", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
  rows = []
  for name in _SUITE.value:
    for row in SUITES[name]():
      rows.append(dict(suite=name, **row))
      print(f"{row['ratio']:8.2f}  {row['target']:>10}  {row['what']}",
            flush=True)  # fmt: skip
  if _OUTPUT.value:
    with open(_OUTPUT.value, "x", encoding="utf-8") as file:
      json.dump(dict(about=about, rows=rows), file, indent=2)
  return command.DONE


if __name__ == "__main__":
  command.run(main)
