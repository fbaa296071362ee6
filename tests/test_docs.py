"""The pages: every command runs, every field, file and section is there."""

import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tokenize

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
def test_every_command_of_a_page_runs(page, tmp_path, monkeypatch):
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
  code = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
  reads = page.name == "README.md" and code
  if reads or any(x.endswith("hope_linear_tiny") for c in found for x in c):
    # In the place of runs/hope_tiny, where a page wants its memory.
    found.insert(0, _small(["lm", "--config=hope_linear_tiny"]))
  for command, done in zip(found, forked.run(found, tmp_path)):
    assert done.returncode == 0, (command, done.stderr[-2000:])
  if reads:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(text)
    exec(code[0].replace("runs/hope_tiny", "runs/hope_linear_tiny"), {})
    assert (tmp_path / "readme.memory").stat().st_size > 1000


def test_the_page_of_all_fields_is_what_the_command_prints():
  page = (ROOT / "docs" / "config.md").read_text("utf-8")
  again = "python -m experiments.fields > docs/config.md"
  assert page == fields.page(), f"make it again: {again}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_of_a_page_are_there(page):
  text = page.read_text("utf-8")
  links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
  for link in ("".join(x) for x in links):
    if "://" in link:
      continue
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    assert target.exists(), link
    if anchor and target.suffix == ".md":
      assert anchor in anchors(target), link
  for file in re.findall(r"`((?:nl_jax|kernels|tests|experiments)/[^`*<]+)`",
                         text):  # fmt: skip
    assert (ROOT / file).exists(), file


def headings(page: pathlib.Path) -> list[str]:
  text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
  return re.findall(r"^#+ (.+)$", text, re.M)


@functools.cache
def anchors(page: pathlib.Path) -> set[str]:
  """What links may name: headings in small letters, with dashes."""
  plain = [re.sub(r"[^\w\- ]", "", x.lower()) for x in headings(page)]
  return {x.strip().replace(" ", "-") for x in plain}


@functools.cache
def sections(page: pathlib.Path) -> set[str]:
  """The numbers of a page's sections, as 2 and 2.5."""
  found = (re.match(r"(\d+(?:\.\d+)?)\.? ", x) for x in headings(page))
  return {x[1] for x in found if x}


# A page, and the numbers of sections that may follow it.
_CITED = re.compile(
  r"(?<![\w/.<])((?:[\w.]+/)*\w+\.md)(#[\w-]+)?"
  r"(?:,? (\d+(?:\.\d+)*(?:(?:, | and |-)\d+(?:\.\d+)*)*)(?![\w.]*\d))?"
)
_SOURCES = [
  *(x for room in ("nl_jax", "kernels", "experiments", "examples", "tests")
    for x in sorted((ROOT / room).rglob("*.py"))
    if not x.is_relative_to(ROOT / "nl_jax" / "kernels")),
  *sorted((ROOT / "docs" / "figures").glob("*.py")),
]  # fmt: skip


def prose(path: pathlib.Path) -> str:
  """Comments and docstrings of a file, lines and their marks joined."""
  parts = []
  with open(path, "rb") as file:
    for token in tokenize.tokenize(file.readline):
      is_doc = token.type == tokenize.STRING and '"""' in token.string
      if is_doc or token.type == tokenize.COMMENT:
        parts.append(token.string.lstrip("#"))
  text = re.sub(r"\s+", " ", " ".join(parts))
  return re.sub(r"\[[^]]*\]\([^)]*\)", "", text)  # Links of made pages.


def missing(text: str) -> list[str]:
  """Citations of docs/ in a text that lead nowhere."""
  wrong = []
  for name, anchor, numbers in _CITED.findall(text):
    page = ROOT / name
    if not page.exists():
      wrong.append(name)
      continue
    wanted = re.findall(r"[\d.]+", numbers)
    if not set(wanted) <= sections(page):
      wrong.append(f"{name} {numbers}")
    if anchor and anchor[1:] not in anchors(page):
      wrong.append(name + anchor)
  return wrong


def test_what_is_cited_is_there():
  wrong = [
    f"{path.relative_to(ROOT)}: {what}"
    for path in _SOURCES
    for what in missing(prose(path))
  ]
  assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sections_that_a_page_names_are_there(page):
  text = re.sub(r"\s+", " ", page.read_text("utf-8"))
  for name, numbers in re.findall(
    r"\[(\w+\.md)\]\(\1\)[,)]? (\d+(?:\.\d+)?)\b", text
  ):
    assert numbers in sections(page.parent / name), (name, numbers)


@pytest.mark.parametrize("text, found", [
  ("as docs/mathematics.md 2.3, 2.5 say", []),
  ("docs/mathematics.md 2.99", ["docs/mathematics.md 2.99"]),
  ("(docs/nowhere.md 2)", ["docs/nowhere.md"]),
  ("spec model.md 3", ["model.md"]),
  ("docs/guide.md#nowhere", ["docs/guide.md#nowhere"]),
])  # fmt: skip
def test_a_citation_that_leads_nowhere_is_found(text, found):
  assert missing(text) == found


def test_the_site_is_built_without_a_warning(tmp_path):
  pytest.importorskip("mkdocs", reason="needs mkdocs, of the extra docs")
  command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
  done = subprocess.run(
    [*command, f"--site-dir={tmp_path / 'site'}"], cwd=ROOT, text=True,
    capture_output=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  page = (tmp_path / "site" / "api" / "memory" / "index.html").read_text()
  assert "nl_jax.memory.rule.Rule" in page


@pytest.mark.parametrize("room, page", [
  ("optim", "optim"), ("data", "data"), ("kernels/rank_one", "kernels"),
  ("kernels/walk", "kernels"), ("kernels/orthogonalize", "kernels"),
  ("kernels/delta_dense", "kernels"),
])  # fmt: skip
def test_every_public_name_is_on_a_page_of_the_site(room, page):
  code = (ROOT / "nl_jax" / room / "__init__.py").read_text("utf-8")
  names = re.findall(r"(\w+) as \1\b", code)
  text = (ROOT / "docs" / "api" / f"{page}.md").read_text("utf-8")
  there = set(re.findall(r"^::: (\S+)$", text, re.M))
  path = f"nl_jax.{room.replace('/', '.')}"
  assert names and {f"{path}.{name}" for name in names} <= there
