"""Compiles the walks of a config for a chip that is not here: one process.

    python -m experiments.kernels.compile '{"config": …, "topology": …}'

The compiler reads where to write its schedules as it is loaded, and may abort:
so each config and chip has a process of its own, which prints its rows as
JSON. `experiments.kernels` calls it.
"""

import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments.kernels import dump, walks
from nl_jax import sharding
from nl_jax.aot import hlo, programs
from nl_jax.aot import text as text_lib
from nl_jax.kernels.walk import vmem

_TOKENS = 512  # Of a step; more compile for many minutes.
_ROWS = "rows "  # Before the line of the answer.


def main(request: dict[str, Any]) -> None:
  """Prints the rows of a request.

  Args:
    request: config and topology; known: digests of walks that need no row
      again; forms: of "fused", "xla"; heads: of a kernel's step, by digest, to
      try in place of the default.
  """
  with tempfile.TemporaryDirectory() as name:
    programs.environment(pathlib.Path(name))
    folder = pathlib.Path(name) / programs.SCHEDULES
    os.environ["LIBTPU_INIT_ARGS"] = dump.arguments(folder)
    devices = programs.devices(request["topology"])
    mesh = sharding.mesh(devices=devices[:1])
    with jax.set_mesh(mesh):
      rows = _rows(request, mesh, folder)
  print(_ROWS + json.dumps(rows))


def answer(text: str) -> list[dict[str, Any]] | None:
  """The rows that a process printed, or None where it did not come to them."""
  lines = [x for x in text.splitlines() if x.startswith(_ROWS)]
  return json.loads(lines[-1].removeprefix(_ROWS)) if lines else None


def _rows(
  request: dict[str, Any], mesh: jax.sharding.Mesh, folder: pathlib.Path
) -> list[dict[str, Any]]:
  rows = []
  known = set(request.get("known", ()))
  for body in walks.of_config(request["config"]):
    digest = walks.digest(body)
    row = _about(body) | dict(digest=digest)
    rows.append(row)
    if body.how is None or digest in known:
      continue
    known.add(digest)
    if request.get("tune"):
      row["tries"] = _tries(request["config"], body, mesh, folder)
      continue
    row |= _estimates(body)
    for form in request.get("forms", ("fused", "xla")):
      made = {"fused": _fused, "xla": _xla}[form](body, mesh, folder)
      row[form] = made
  return rows


def _about(body: walks.Body) -> dict[str, Any]:
  K, M = body.sizes
  row = dict(
    config=body.config, body=body.call.name, K=K, M=M, C=body.chunk,
    heads=body.heads, chunks=body.chunks, reason=body.call.reason,
    policy=body.call.policy.name,
  )  # fmt: skip
  if body.how is not None:
    row |= dict(
      chip=vmem.chip()[0], step=body.how.heads, save=body.how.save,
      vmem=body.need, vmem_limit=body.how.limit,
    )  # fmt: skip
  return row


def _estimates(body: walks.Body) -> dict[str, Any]:
  forward, backward = walks.products_flops(body)
  return dict(flops=dict(F=forward, G=backward))


def _fused(
  body: walks.Body, mesh: jax.sharding.Mesh, folder: pathlib.Path
) -> dict[str, Any]:
  """F, the forward kernel; S, saving states; G, the backward kernel."""
  program = walks.program(body, "pallas_tpu", mesh)
  inputs = program.inputs
  kernels = {}
  moved = walks.moved(body, program.forward, inputs)
  text, seconds, schedules = _compiled(program.forward, inputs, folder)
  kernels["F"] = _kernel("_fwd", body, text, schedules, moved)
  inputs = (*inputs, program.cotangents)
  moved = walks.moved(body, program.backward, inputs)
  text, more, schedules = _compiled(program.backward, inputs, folder)
  kernels["S"] = _kernel("_fwd", body, text, schedules, moved)
  kernels["G"] = _kernel("_bwd", body, text, schedules, moved)
  return kernels | dict(seconds=seconds + more)


def _kernel(
  which: str,
  body: walks.Body,
  text: str,
  schedules: dict[str, dump.Schedule],
  moved: dict[str, walks.Moved],
) -> dict[str, Any]:
  """A kernel's row; `which` ends its name."""
  name = body.call.name + which
  computations, entry = text_lib.parse(text)
  (call,) = (
    ins.name for ins in computations[entry].body.values()
    if "tpu_custom_call" in ins.text and name in ins.name
  )  # fmt: skip
  schedule = schedules[call]
  heads = body.how.heads
  return dict(
    bundles=schedule.bundles / heads,
    empty=schedule.empty / schedule.bundles,
    slots=schedule.slots,
    spills=schedule.spills,
    hbm=moved[name].of_chunk(body.chunks),
  )


def _xla(
  body: walks.Body, mesh: jax.sharding.Mesh, folder: pathlib.Path
) -> dict[str, Any]:
  """The same of the XLA form: what its loops over chunks launch."""
  program = walks.program(body, "xla", mesh)
  inputs = (*program.inputs, program.cotangents)
  text, seconds, schedules = _compiled(program.backward, inputs, folder)
  forward, *backward = [
    _launches(loop, schedules, program) for loop in hlo.loops(text)
  ]
  add = lambda key: sum(part[key] for part in backward)
  return dict(F=forward, G={key: add(key) for key in forward}, seconds=seconds)


def _launches(
  loop: list[tuple[text_lib.Instruction, int]],
  schedules: dict[str, dump.Schedule],
  program: walks.Program,
) -> dict[str, float]:
  """Of a chunk; cycles and bundles of a head as well."""
  heads = program.rows * program.heads * program.chunks
  bundles = sum(
    times * schedules[ins.name].bundles
    for ins, times in loop if ins.name in schedules
  )  # fmt: skip
  cycles = sum(times * hlo.estimated_cycles(ins) for ins, times in loop)
  operations = sum(times for _, times in loop)
  return dict(
    operations=operations / program.chunks,
    cycles=cycles / heads,
    bundles=bundles / heads,
  )


def _tries(
  config: str,
  body: walks.Body,
  mesh: jax.sharding.Mesh,
  folder: pathlib.Path,
) -> list[dict[str, Any]]:
  """Bundles of the backward and forward kernel by heads of a step."""
  digest = walks.products_flops(body)
  tries = []
  for heads in walks.step_heads(body):
    (again,) = (
      other for other in walks.of_config(config, heads)
      if other.call.name == body.call.name
      and walks.products_flops(other) == digest
    )  # fmt: skip
    row = dict(heads=heads, vmem=again.need)
    if heads * body.chunk > _TOKENS or again.need > again.how.limit:
      tries.append(row)
      continue
    try:
      made = _fused(again, mesh, folder)
    except jax.errors.JaxRuntimeError as error:
      row["error"] = str(error).splitlines()[0]
    else:
      row["bundles"] = made["S"]["bundles"] + made["G"]["bundles"]
      row["seconds"] = made["seconds"]
    tries.append(row)
  return tries


def _compiled(
  run: Callable[..., Any], inputs: tuple, folder: pathlib.Path
) -> tuple[str, float, dict[str, dump.Schedule]]:
  """(text, seconds, schedules) of a program."""
  begin = time.perf_counter()
  text = jax.jit(run).lower(*inputs).compile().as_text()
  seconds = time.perf_counter() - begin
  return text, seconds, dump.read(folder)


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
