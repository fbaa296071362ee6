"""Prints docs/config.md: `python -m experiments.fields > docs/config.md`.

Every field of every config, from the dataclasses and functions that read them;
a test says when the page is not what this prints.
"""

import inspect
from collections.abc import Iterator, Mapping

from experiments.cli import command

_HEAD = """# The fields of a config

`--config.<group>.<field>=<value>` changes a field of any config. A tuple is
written `1,4,16`. A field that nothing reads is refused, and so is a value that
does not fit ([errors.md](errors.md)): what a field takes stands in the third
column, and an entry of a tuple is `model.cms.widths[1]` in a message.
`python -m experiments.lm --config=<name> --describe` prints the fields of any
config as they will be used.

`optim.name` chooses a rule, and the group of its name has its options; in these
groups `none` stands for None, and so does 0 where a number may be None. What
the chosen rule does not read is refused.

Defaults are those of the dataclass or function that reads a group; where there
is none, every config says a value. What configs say besides stands below the
tables of mixers, at the size `tiny`. This page is printed by
`python -m experiments.fields`.
"""
_TITLES = {
  "data": "Data",
  "optim": "Optimizer",
  "train": "Training",
  "checkpoint": "Checkpoints",
  "eval": "Evaluation while training",
  "mesh": "Devices",
}
_COLUMNS = "| field | default | takes | meaning |\n|---|---|---|---|\n"


def main() -> int:
  """Runs the command; returns its exit status."""
  print(page(), end="")
  return command.DONE


def page() -> str:
  """The whole page."""
  from nl_jax.models import lm
  from nl_jax.train import config as configs

  groups = configs.table("hope", in_context=True)
  parts = [_HEAD, "## Model\n", _table({"model": groups["model"]})]
  parts.append("## Mixers\n\nThe group `model.mixer`, by `model.arch`.\n")
  for archs in _alike(lm.MIXERS):
    known = configs.table(archs[0])
    mixer = {k: x for k, x in known.items() if k.startswith("model.mixer")}
    parts.append(f"### {', '.join(f'`{x}`' for x in archs)}\n")
    parts.append(_table(mixer))
    parts.append("\n".join(_said(archs)) + "\n")
  chain = configs.table("hope")["model.cms"]
  learning = {k: x for k, x in groups["model.cms"].items() if k not in chain}
  parts += ["## Continuum memory system\n", _table({"model.cms": chain})]
  parts += [
    "## Levels that learn in context\n",
    "Of the configs `…_incontext`.\n",
    _table({"model.cms": learning}),
  ]
  for path, title in _TITLES.items():
    chosen = {k: x for k, x in groups.items() if k.split(".")[0] == path}
    parts += [f"## {title}\n", _table(chosen)]
  return "\n".join(parts)


def _alike(mixers: Mapping[str, object]) -> list[list[str]]:
  """Archs of one module together."""
  by_module: dict[object, list[str]] = {}
  for arch, module in mixers.items():
    by_module.setdefault(module, []).append(arch)
  return list(by_module.values())


def _table(groups: Mapping[str, Mapping]) -> str:
  rows = [
    f"| `{path}.{name}` | {_default(field.default)} | {field.said} | "
    f"{_remark(field.remark)} |"
    for path, group in groups.items()
    for name, field in group.items()
    if field.group is None
  ]
  return _COLUMNS + "\n".join(rows) + "\n"


def _default(value: object) -> str:
  return "" if value is inspect.Parameter.empty else f"`{value!r}`"


def _remark(text: str) -> str:
  text = text[:1].upper() + text[1:]
  return text.replace("|", "\\|") + ("" if text.endswith(".") else ".")


def _said(archs: list[str]) -> Iterator[str]:
  """What the small configs of some archs say, where it is not a default."""
  from experiments.cli import named
  from nl_jax.train import config as configs

  for name in named.config_names():
    config = named.load_config(name) if name.endswith("_tiny") else None
    if config is None or config.model.arch not in archs:
      continue
    known = configs.flat(configs.table(config.model.arch))
    values = [
      f"`{path.removeprefix('model.mixer.')}={value!r}`"
      for path, value in configs.leaves(
        config.model.mixer.to_dict(), "model.mixer."
      )
      if value != known[path].default
    ]
    if values:
      yield f"- `{name}`: {', '.join(values)}"


if __name__ == "__main__":
  command.run(main)
