"""Tables of `experiments.kernels`: estimates, limits and what they may lose."""

from collections.abc import Iterable, Sequence
from typing import Any

from experiments.kernels import dump
from nl_jax.aot import chips

_CORES = {"v4": 2, "v5p": 2, "tpu7x": 2}  # Of a chip; a kernel runs on one.
_MORE = 1.05  # Of bundles and spills, before a gate fails.
CAVEATS = (
  "No TPU has run this. Bundles are what the compiler schedules, one a cycle, "
  "without waits for memory and transfers; a kernel measured elsewhere took "
  "about 1.4 times its bundles.",
  "F: a chunk forward, S: the same with states kept, G: backward with what it "
  "makes again. Bundles and bytes are those of a head and chunk.",
  "Share of the limit: the least time for the chunk function's products, each "
  "once at the peak, or for its bytes of main memory, over that of bundles or "
  "bytes.",
  "VMEM is our estimate, before the compiler's; bytes are exact, from blocks.",
  "The XLA form: what its loops over chunks launch; the compiler's cycles "
  "overcharge small operations; bundles leave out what a launch costs, and "
  "count a loop inside an operation once.",
)


def limit_share(row: dict[str, Any], part: str, chip: str) -> float | None:
  """Least time of a kernel's products and bytes over that of its schedule.

  Args:
    row: of a body; part: "F" or "G"; chip: a key of CHIPS.

  Returns:
    None where the clock is not known.
  """
  made, cores = chips.CHIPS[chip], _CORES.get(chip, 1)
  if not made.clock:
    return None
  kernel = row["fused"][part]
  memory = kernel["hbm"] * cores / made.hbm_rate
  products = row["flops"][part] * cores / made.flops
  return max(products, memory) / max(kernel["bundles"] / made.clock, memory)


def table(rows: Sequence[dict[str, Any]], topology: str) -> str:
  """Markdown: a line a kernel; configs with one body share it."""
  chip = topology.partition(":")[0]
  lines = [
    f"Kernels on {topology}\n",
    "| walk | configs | K, M, C | heads a step | products | bundles F | S | G "
    "| " + " | ".join(f"{slot} of G" for slot in dump.SLOTS)
    + " | spills and fills a bundle F | G | VMEM | bytes of main memory F | G "
    "| share of the limit F | G | compiled in |",
    "|---|---|---|---|---|---|---|---|" + "---|" * len(dump.SLOTS)
    + "---|---|---|---|---|---|---|---|",
  ]  # fmt: skip
  for row, configs in _by_body(rows):
    start = f"| {row['body']} | {', '.join(configs)} | {_shape(row)} |"
    if "fused" not in row:
      why = row.get("error") or f"by XLA: {row['reason']}"
      lines.append(f"{start} {why} |")
      continue
    lines.append(f"{start} {_kernel_cells(row, chip)} |")
  return "\n".join(lines)


def _kernel_cells(row: dict[str, Any], chip: str) -> str:
  fused = row["fused"]
  F, S, G = (fused[part] for part in "FSG")
  share = lambda part: _percent(limit_share(row, part, chip))
  step = f"{row['step']} of {row['heads']}"
  if row["save"] > 1:
    step += f", states of every {row['save']} chunks"
  return " | ".join(
    [
      step,
      row["policy"],
      *(f"{part['bundles']:,.0f}" for part in (F, S, G)),
      *(f"{G['slots'].get(s, 0):.2f}" for s in dump.SLOTS),
      f"{F['spills']:.2f}",
      f"{G['spills']:.2f}",
      f"{row['vmem'] / 2**20:.0f} of {row['vmem_limit'] / 2**20:.0f} MiB",
      f"{F['hbm']:,.0f}",
      f"{G['hbm']:,.0f}",
      share("F"),
      share("G"),
      f"{fused['seconds']:.0f} s",
    ]
  )


def xla_table(rows: Sequence[dict[str, Any]], topology: str) -> str:
  """Markdown: the XLA form of the same walks, two estimators apart."""
  lines = [
    f"The XLA form of the same walks on {topology}, a chunk\n",
    "| walk | configs | operations F | G | classic cycles a head F | G | "
    "bundles a head F | G | compiled in |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for row, configs in _by_body(rows):
    if "xla" not in row:
      continue
    F, G = row["xla"]["F"], row["xla"]["G"]
    cells = [
      f"{part[key]:,.0f}"
      for key in ("operations", "cycles", "bundles") for part in (F, G)
    ]  # fmt: skip
    lines.append(
      f"| {row['body']} | {', '.join(configs)} | {' | '.join(cells)} | "
      f"{row['xla']['seconds']:.0f} s |"
    )
  return "\n".join(lines)


def _by_body(
  rows: Iterable[dict[str, Any]],
) -> list[tuple[dict[str, Any], list[str]]]:
  """(row, configs) of each body; a row without figures has them elsewhere."""
  found: dict[str, tuple[dict[str, Any], list[str]]] = {}
  for row in rows:
    key = row["digest"]
    if key not in found:
      found[key] = (row, [])
    found[key][1].append(row["config"])
  return list(found.values())


def _shape(row: dict[str, Any]) -> str:
  return f"{row['K']}, {row['M']}, {row['C']}"


def _percent(share: float | None) -> str:
  return "-" if share is None else f"{share:.0%}"


def baseline(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """What is held: of each kernel its bundles, spills and bytes; VMEM."""
  kept = []
  for row, configs in _by_body(rows):
    if "fused" not in row:
      continue
    parts = {
      part: {key: round(row["fused"][part][key], 3)
             for key in ("bundles", "spills", "hbm")}
      for part in "FSG"
    }  # fmt: skip
    kept.append(
      dict(body=row["body"], configs=configs, vmem=row["vmem"], **parts)
    )
  return kept


def worse(
  rows: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]
) -> list[str]:
  """A sentence for each gate that fails.

  Args:
    rows: of a report.
    held: of `baseline`, for the same chip.
  """
  by_config = {
    (config, row["body"]): row for row in held for config in row["configs"]
  }
  compiled = {row["config"] for row in rows if "error" not in row}
  seen = {(row["config"], row["body"]) for row in rows}
  failed = [
    f"{body} of {config}: no walk of it any more"
    for config, body in by_config
    if config in compiled and (config, body) not in seen
  ]
  for row, configs in _by_body(rows):
    name = f"{row['body']} of {configs[0]}"
    if "error" in row:
      continue  # Said where it was met.
    before = by_config.get((configs[0], row["body"]))
    if before is None:
      if "fused" in row:
        failed.append(f"{name}: not in the baseline")
      continue
    if "fused" not in row:
      failed.append(f"{name}: had kernels, has none: {row['reason']}")
      continue
    failed += _failed(name, row, before)
  return failed


def _failed(
  name: str, row: dict[str, Any], before: dict[str, Any]
) -> Iterable[str]:
  for part in "FSG":
    now, then = row["fused"][part], before[part]
    for key, words in (
      ("bundles", "bundles"), ("spills", "spills and fills a bundle"),
    ):  # fmt: skip
      # A hundredth of a spill a bundle is none.
      if now[key] > _MORE * then[key] + (0.01 if key == "spills" else 0):
        yield (
          f"{name}, {part}: {words} from {then[key]:,.2f} to {now[key]:,.2f}"
        )
    if round(now["hbm"], 3) != then["hbm"]:
      yield (
        f"{name}, {part}: bytes of main memory from {then['hbm']:,.0f} to "
        f"{now['hbm']:,.0f}"
      )
  if row["vmem"] > _MORE * before["vmem"]:
    MiB = lambda n: f"{n / 2**20:.1f} MiB"
    yield f"{name}: VMEM from {MiB(before['vmem'])} to {MiB(row['vmem'])}"


_TILE = ("chip", "name", "C", "K", "M")  # What a row of tiles.json is of.


def tiles(
  rows: Iterable[dict[str, Any]],
  before: Iterable[dict[str, Any]],
  gain: float = 0.02,
) -> list[dict[str, Any]]:
  """Rows of `tiles.json`: what was tried, and what beats the default.

  A row says which bodies were compiled, the heads a step of the default, and
  of all heads the bundles over the default's. It has `heads`, which a kernel
  then takes, only where others spare more than `gain`. Bodies that a row does
  not tell apart are tried together: the worst of them counts.

  Args:
    rows: of --tune, `tries` of each body.
    before: the file's rows; those of bodies that were not tried stay.
    gain: share of the bundles of the default.
  """
  tried: dict[tuple, dict[str, Any]] = {}
  for row, configs in _by_body(rows):
    bundles = {t["heads"]: t["bundles"] for t in row.get("tries", ())
               if "bundles" in t}  # fmt: skip
    if row.get("step") not in bundles:
      continue
    key = {k: row["body" if k == "name" else k] for k in _TILE}
    own = {h: round(n / bundles[row["step"]], 3) for h, n in bundles.items()}
    made = tried.setdefault(
      tuple(key.values()),
      key | dict(configs=[], default=row["step"], of_default=own),
    )
    made["configs"] += configs
    made["of_default"] = {
      heads: max(n, own[heads])
      for heads, n in made["of_default"].items() if heads in own
    }  # fmt: skip
  for made in tried.values():
    best = min(made["of_default"], key=made["of_default"].get)
    if made["of_default"][best] < 1 - gain:
      made["heads"] = best
  stay = lambda row: tuple(row[key] for key in _TILE) not in tried
  return [row for row in before if stay(row)] + list(tried.values())
