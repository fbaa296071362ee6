"""The real steps of a config, compiled for chips that are not here."""

import importlib.util
import math
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from nl_jax import build, sharding, stream
from nl_jax.aot import bundles, chips, estimate, hlo
from nl_jax.kernels import walk
from nl_jax.models import flops as flops_lib
from nl_jax.train import state as state_lib
from nl_jax.train import step as step_lib

PROGRAMS = ("train", "decode")
SCHEDULES = "schedules"  # Folder in that of `environment`.


def require_compiler() -> None:
  """Raises ValueError where the compiler is not installed."""
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "libtpu, the compiler for TPUs, is not installed: run `pip install -e "
      ".[tpu]`; no TPU is needed"
    )


def environment(folder: pathlib.Path) -> None:
  """Lets the compiler run without its chips; before JAX finds its devices.

  Args:
    folder: where the compiler writes the programs that it makes, and in it the
      schedules of their operations. JAX has the programs too, but jaxlib
      0.10.2 cannot read those with work on sparse cores of libtpu 0.0.51.

  Raises:
    ValueError: the compiler is not installed.
  """
  require_compiler()
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")  # Raised all the same.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  # Any will do: without them it prints that it found no host.
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  written = (
    f"--xla_dump_to={folder} --xla_dump_hlo_as_text "
    "--xla_dump_hlo_module_re=jit_step"
  )
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {written}"
  schedules = folder / SCHEDULES
  schedules.mkdir()
  given = os.environ.get("LIBTPU_INIT_ARGS", "")
  wanted = bundles.arguments(schedules)
  os.environ["LIBTPU_INIT_ARGS"] = f"{given} {wanted}"
  jax.config.update("jax_platforms", "cpu")


def devices(topology: str) -> list[Any]:
  """The devices of a topology as "v5e:16x16".

  Raises:
    ValueError: no such slice.
  """
  chip = chips.kind(topology)
  options: dict[str, Any] = {}
  if chip == "v4":  # JAX's meshes are of chips; its cores are apart by default.
    options["chip_config_name"] = "megacore"
  sides = topology.partition(":")[2].split("x")
  if len(sides) == 3 and not any(int(side) % 4 for side in sides):
    options["wrap"] = (True,) * 3  # Slices of whole cubes close to a torus.
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, **options
    )
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f"--topology={topology}: the compiler knows no such slice: "
      + str(error).splitlines()[0]
    ) from error
  return found.devices


def asked_mesh(text: str) -> dict[str, int]:
  """The sizes of --mesh.

  Args:
    text: as "fsdp=128,tensor=2".

  Raises:
    ValueError: text that is not a mesh.
  """
  given = {}
  for pair in text.split(",") if text else ():
    axis, _, size = pair.partition("=")
    whole = size.isdecimal() or size == "-1"
    if axis not in sharding.AXES or not whole or axis in given:
      raise ValueError(
        f"--mesh={text}: expected each axis at most once with a size, as "
        f"fsdp=128,tensor=2; got {pair!r}; axes: {', '.join(sharding.AXES)}"
      )
    given[axis] = int(size)
  return given


def report(
  config: build.ConfigDict,
  program: str,
  mesh: jax.sharding.Mesh,
  chip: str,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Compiles a program and tells what a device needs for it.

  Args:
    config: resolved.
    program: of PROGRAMS.
    mesh: over a topology's devices.
    chip: a key of CHIPS.
    folder: of `environment`.
  """
  like, lower = (_train if program == "train" else _decode)(config, mesh)
  made = chips.CHIPS[chip]
  places = {tuple(device.coords) for device in mesh.devices.flat}
  per_chip = mesh.size // len(places)
  memory = {key: _per_device(tree) for key, tree in like.items()}
  row = dict(program=program, devices_of_a_chip=per_chip, memory=memory)
  begin = time.perf_counter()
  try:
    with jax.set_mesh(mesh), walk.recorded() as walks:
      run = lower()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise ValueError(
        f"the {program} step does not compile for {chip}: "
        + str(error).splitlines()[0]
      ) from error
    row["refused"] = str(error).splitlines()[0]
    return row | _fits(config, memory, made.hbm_bytes / per_chip)
  row["compile_seconds"] = time.perf_counter() - begin
  memory.update(_memory(run.memory_analysis()))
  row |= _fits(config, memory, made.hbm_bytes / per_chip)
  schedules = bundles.read(folder / SCHEDULES)
  counts = hlo.count(_text(folder), dict(mesh.shape), schedules)
  once = run.cost_analysis() or {}
  formula = _formula(config) / mesh.size if program == "train" else 0.0
  # Products in kernels are not counted.
  least = counts._replace(flops=max(counts.flops, formula))
  roofline = chips.roofline(least, made, per_chip)
  parts = estimate.estimate(counts, made, per_chip, config.data.sequence_length)
  return row | dict(
    walks=build.walk_rows(walks),
    flops=counts.flops,
    formula=formula,
    formula_seconds=formula * per_chip / made.flops,
    hbm_bytes=counts.hbm_bytes,
    cycles=counts.cycles,
    loops=counts.loops,
    unknown=counts.unknown,
    collectives=[c._asdict() for c in counts.collectives],
    loops_once={k: once.get(k) for k in ("flops", "bytes accessed")},
    estimate=roofline._asdict()
    | dict(least=roofline.least, most=roofline.most),
    schedule=parts and parts._asdict() | dict(seconds=parts.seconds),
  )


def _text(folder: pathlib.Path) -> str:
  """The program that was compiled last; its files are removed."""
  written = folder.glob("*.after_codegen.txt")
  text = max(written, key=lambda path: path.stat().st_mtime_ns).read_text()
  for path in folder.iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  (folder / SCHEDULES).mkdir()
  return text


def _formula(config: build.ConfigDict) -> float:
  """Operations of a step as MFU counts them: nothing twice, all kernels."""
  rows, length = config.data.batch_size, config.data.sequence_length
  return rows * length * flops_lib.training(build.model(config), length)


def _per_device(tree: Any) -> float:
  """Bytes of a tree of shapes with shardings, on each device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _memory(stats: Any) -> dict[str, float]:
  """What the compiler says, and what is held at once."""
  found = dict(
    arguments=stats.argument_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    outputs=stats.output_size_in_bytes,
    donated=stats.alias_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
  )
  return found | {"total": sum(found.values()) - 2 * found["donated"]}


def _fits(
  config: build.ConfigDict, memory: dict[str, float], capacity: float
) -> dict[str, Any]:
  fits = memory.get("total", float("inf")) <= capacity
  knobs = tuple(config.model.get("mixer", None) or ())
  train = config.train
  advice = chips.advice(memory, train.accumulate, train.remat, knobs)
  return dict(fits=fits, capacity=capacity, advice="" if fits else advice)


def _train(config: build.ConfigDict, mesh: jax.sharding.Mesh) -> tuple:
  """(what is held, a function that compiles) of the step of experiments.lm."""
  net = build.model(config)
  made = build.make_optimizer(config, net)
  like = state_lib.abstract(net, made.tx, mesh, build.streams(config))
  step = step_lib.make(
    net, made.tx, made.schedule, made.labels,
    accumulate=config.train.accumulate,
    carry_gradient=config.train.carry_gradient,
    max_skipped=config.train.max_skipped,
  )  # fmt: skip
  data = config.data
  lower = lambda: step_lib.compiled(
    step, like, mesh, data.batch_size, data.sequence_length
  )
  return dict(parameters=like["params"], optimizer=like["opt"]), lower


def _decode(config: build.ConfigDict, mesh: jax.sharding.Mesh) -> tuple:
  """The same of one more token for each row, with weights as `stream` has."""
  net = build.model(config)
  made = lambda key: stream.for_decoding(net, net.init(key))
  params = jax.eval_shape(made, jax.random.key(0))
  rows, length = config.data.batch_size, config.data.sequence_length
  start = lambda params: net.init_state(params, rows, length)
  state = jax.eval_shape(start, params)
  place = lambda tree, shardings: jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree, shardings,
  )  # fmt: skip
  params = place(params, sharding.decode_shardings(params, net.axes(), mesh))
  state = place(state, sharding.sequence_shardings(state, mesh))
  by_row = jax.sharding.NamedSharding(mesh, sharding.spec("batch"))
  tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=by_row)

  def step(params: Any, tokens: Any, state: Any) -> tuple:
    logits, state, _ = net.apply(params, tokens, state)
    return logits[:, -1], state

  out = (by_row, jax.tree.map(lambda x: x.sharding, state))
  jitted = jax.jit(step, donate_argnums=2, out_shardings=out)
  lower = lambda: jitted.lower(params, tokens, state).compile()
  return dict(parameters=params, optimizer=(), state=state), lower
