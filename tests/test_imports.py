"""Who imports whom (docs/architecture.md 2), and what importing costs."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = {
  "experiments", "train", "eval", "stream", "models", "data", "memory",
  "optim", "levels", "sharding", "card", "kernels", "tasks", "types", "files",
  "formats", "tensors", "fields", "debugging", "build", "report", "aot",
  "pretrained",
}  # fmt: skip
_OF_COMMANDS = {
  "build", "models", "train", "stream", "sharding", "card", "kernels",
}  # fmt: skip
MAY = {
  "experiments": ROOMS,
  "build": {
    "models", "optim", "data", "train", "eval", "sharding", "kernels",
  },
  "report": _OF_COMMANDS | {"data"},
  "aot": _OF_COMMANDS,
  "pretrained": _OF_COMMANDS | {"tensors"},
  "train": {
    "models", "optim", "data", "sharding", "levels", "card", "formats",
    "files",
  },
  "eval": {"data", "models", "tasks", "levels", "sharding"},
  "stream": {
    "models", "memory", "levels", "sharding", "formats", "files", "tensors",
  },
  "models": {"memory", "kernels", "levels", "sharding", "card", "types"},
  "data": {"tasks", "formats", "files"},
  "memory": {"kernels"},
  "optim": {"kernels"},
  "levels": set(),
  "sharding": set(),
  "card": {"levels"},
  "kernels": set(),
  "tasks": set(),
  "types": set(),
  "files": set(),
  "formats": set(),
  "tensors": {"files"},
  "fields": set(),
  "debugging": set(),
}  # fmt: skip
SMALL = {"types", "files", "fields", "debugging"}
WITH_TYPES = ROOMS - {"kernels", "optim", "tasks"}
CORE = {"jax", "optax", "numpy"}
LIBRARIES = {
  "kernels": CORE, "memory": CORE, "optim": CORE, "levels": CORE,
  "sharding": CORE, "card": CORE, "tasks": {"numpy"},
  "fields": set(), "files": set(), "formats": set(), "debugging": set(),
  "tensors": {"numpy", "safetensors"},
}  # fmt: skip
FILES = [
  *ROOT.glob("nl_jax/**/*.py"), *ROOT.glob("kernels/**/*.py"),
  *ROOT.glob("experiments/**/*.py"),
]  # fmt: skip


_STARTED = re.compile(r"python -m (experiments(?:\.[a-z]\w*)+)")
_IMPORTED = re.compile(r"^ +from (nl_jax[\w.]*) import ([\w, ]+)", re.M)


def room_of(path):
  parts = path.relative_to(ROOT).parts
  name = parts[1] if parts[0] == "nl_jax" else parts[0]
  return name.removesuffix(".py")


def imported(path):
  """Dotted names of everything that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path):
  room = room_of(path)
  if room == "__init__":
    assert not list(imported(path))
    return
  allowed = MAY[room] | {room}
  allowed |= SMALL if room in WITH_TYPES else set()
  for name in imported(path):
    top, _, rest = name.partition(".")
    assert top != "kernels", "import nl_jax.kernels"
    if top in ("nl_jax", "experiments"):
      target = rest.split(".")[0] if top == "nl_jax" else "experiments"
      assert target in allowed, f"{room} imports {name}"
    elif top == "flax":
      assert room == "models" and "nnx" not in name, f"{room} imports {name}"
    elif top in ("seqio", "tensorflow", "tensorflow_datasets"):
      assert room == "eval", f"{room} imports {name}"
    elif room in LIBRARIES and top not in sys.stdlib_module_names:
      assert top in LIBRARIES[room], f"{room} imports {name}"


def name_of(path):
  """The name that a file is imported by."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  parts = ("nl_jax", *parts) if parts[0] == "kernels" else parts
  return ".".join(parts).removesuffix(".__init__")


def module_of(name, paths):
  """Of a.b, the module a.b, or where there is none a, which has b."""
  return name if name in paths else name.rpartition(".")[0]


def test_no_module_imports_itself_by_others():
  """In a function too: whoever reads one of a circle must read all of it."""
  paths = {name_of(path): path for path in FILES}
  graph = {
    name: {module_of(x, paths) for x in imported(path)} - {name}
    for name, path in paths.items()
  }
  try:
    tuple(graphlib.TopologicalSorter(graph).static_order())
  except graphlib.CycleError as error:
    raise AssertionError(" <- ".join(error.args[1])) from None


def test_what_docstrings_import_and_start_is_there():
  """As `from nl_jax import stream` or `python -m experiments.lm`."""
  paths, found = {name_of(path): path for path in FILES}, []
  for path in FILES:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
        text = ast.get_docstring(node) or ""
        found += [(path, x) for x in _STARTED.findall(text)]
        for module, names in _IMPORTED.findall(text):
          found += [(path, f"{module}.{x.strip()}") for x in names.split(",")]
  assert len(found) > 20
  for path, name in found:
    module = module_of(name, paths)
    assert module in paths, f"{path}: {name}"
    rest = name.removeprefix(module).lstrip(".")
    assert not rest or re.search(rf"\b{rest}\b", paths[module].read_text()), (
      f"{path}: {name}"
    )


def test_files_are_short():
  lines = {
    str(path.relative_to(ROOT)): len(path.read_text().splitlines())
    for path in FILES
  }
  assert not {name for name, count in lines.items() if count > 500}


def modules_after(code):
  code += "; import sys; print(*sys.modules)"
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  return set(out.stdout.split())


def test_import_is_light_and_touches_no_device():
  code = (
    "import nl_jax, nl_jax.models.lm, jax;"
    "from jax._src import xla_bridge;"
    "assert not xla_bridge._backends, 'a device was touched'"
  )
  loaded = modules_after(code)
  assert not loaded & {"tensorflow", "grain", "flax.nnx", "orbax"}


def test_memory_and_optim_need_only_jax_and_optax():
  loaded = modules_after("import nl_jax.memory, nl_jax.optim")
  assert not loaded & {"flax", "grain", "orbax", "ml_collections"}
