"""The pages: every command runs, every field and file is there."""

import json
import os
import pathlib
import re
import shlex

import pytest

from experiments import fields
from tests.experiments import forked

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_SMALL = ("--config.train.steps=2", "--config.eval.batches=1")
_RUN = "python -m experiments."


def commands(page: pathlib.Path) -> list[list[str]]:
  """The commands of a page's sh blocks, at the smallest size."""
  blocks = re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.S)
  lines = "".join(blocks).replace("\\\n", " ").splitlines()
  found = [part for line in lines for part in line.split("&&") if _RUN in part]
  return [_small(shlex.split(part.split(_RUN)[1])) for part in found]


def _small(command: list[str]) -> list[str]:
  """At the test size, and with the model that compiles fastest.

  HOPE's own way through the same commands: tests/experiments/test_commands.py.
  """
  memories = any(x.startswith(("--memory", "raster")) for x in command)
  fast = "hope_linear_tiny" if memories else "transformer_tiny"
  name, *args = [x.replace("hope_tiny", fast) for x in command]
  if name == "faults":
    # Faults themselves: tests/experiments/test_faults.py.
    args.append("--only=list")
  cooldown = r"(?<=optim\.cooldown_steps=)\d+"
  args = [re.sub(cooldown, "1", arg) for arg in args]
  for i, arg in enumerate(args):
    if re.fullmatch(r"--config=\w+", arg):
      args[i] = f"{arg}:smoke"
  if name == "lm" and not {"--describe", "--list_configs"} & set(args):
    folder = [a.split("=")[1].removesuffix(":smoke") for a in args
              if a.startswith("--config=")]  # fmt: skip
    if not any(a.startswith("--workdir") for a in args):
      args.append(f"--workdir=runs/{folder[0]}")
    cache = os.environ["NL_TEST_CACHE"]
    longer = any(a.startswith("--config.train.steps=") for a in args)
    args += [*_SMALL, f"--compilation_cache={cache}"]
    args += ["--config.train.steps=3"] if longer else []
  return [name, *args]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page, tmp_path):
  found = commands(page)
  if page.name in ("README.md", "guide.md"):
    assert found
  if not found:
    return
  (tmp_path / "corpus").mkdir()
  text = (ROOT / "docs" / "guide.md").read_text("utf-8")
  lines = [json.dumps({"text": text[i:]}) for i in range(0, 400, 8)]
  (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(lines))
  (tmp_path / "book.txt").write_text(text)
  if any(x.endswith("hope_linear_tiny") for c in found for x in c):
    # In the place of runs/hope_tiny, where a page wants its memory.
    found.insert(0, _small(["lm", "--config=hope_linear_tiny"]))
  for command, done in zip(found, forked.run(found, tmp_path)):
    assert done.returncode == 0, (command, done.stderr[-2000:])


def test_the_page_of_all_fields_is_what_the_command_prints():
  page = (ROOT / "docs" / "config.md").read_text("utf-8")
  again = "python -m experiments.fields > docs/config.md"
  assert page == fields.page(), f"make it again: {again}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_of_a_page_are_there(page):
  text = page.read_text("utf-8")
  links = [x for x in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in x]
  for link in links:
    assert (page.parent / link).exists(), link
  for file in re.findall(r"`((?:nl_jax|kernels|tests|experiments)/[^`*<]+)`",
                         text):  # fmt: skip
    assert (ROOT / file).exists(), file
