"""Configs by name: `--config=hope_1b3`, `--config=hope_1b3:smoke`, or a path.

A config is a file of `configs/` with `get_config(arg: str = "")`, which returns
a ConfigDict; files starting with `_` are shared builders. Fields are changed on
the command line by `--config.<group>.<field>=<value>`. Every mistake is found
while the flags are read, and said in one sentence.
"""

import difflib
import importlib.util
import math
import pathlib
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_dict, config_flags

from nl_jax import files

_FOLDER = pathlib.Path(__file__).parents[1] / "configs"
# What random keys tell apart, and what is counted in int32.
_SEEDS, _LARGEST = 2**32 - 1, 2**31 - 1
_OVERRIDE = re.compile(r"--?(no)?config\.(?P<path>[^=]*)")
# What a config file with a mistake in it raises.
_FILE_ERRORS = (
  ArithmeticError,
  AssertionError,
  AttributeError,
  ImportError,
  LookupError,
  NameError,
  OSError,
  SyntaxError,
  TypeError,
)
_TEXTS = ("prompt",)  # Flags that may begin with "~" and are not paths.
_CHOICE = re.compile(r"--?config(=(?P<value>.*))?$")


def config_names() -> list[str]:
  """The names that --config accepts, sorted."""
  names = (path.stem for path in _FOLDER.glob("*.py"))
  return sorted(name for name in names if not name.startswith("_"))


def load_config(value: str) -> config_dict.ConfigDict:
  """The locked config of a name, name:arg, path, path:arg, or config.json.

  Raises:
    ValueError: no such config, an arg that it does not know, or a config file
      that does not run (with the line at fault).
  """
  if value.endswith(".json"):
    return _of_run(pathlib.Path(value))
  name, colon, arg = value.partition(":")
  if name.endswith(".json"):
    raise ValueError(f"unknown config argument {arg!r}; {name} takes none")
  path = pathlib.Path(name) if name.endswith(".py") else _FOLDER / f"{name}.py"
  if not name.endswith(".py") and name not in config_names():
    raise ValueError(
      f"no config named {name!r}. {_did_you_mean(name, config_names())}"
      f"Known: {', '.join(config_names())}"
    )
  if not path.is_file():
    raise ValueError(f"no config file {name!r}")
  config = _run_file(path, [arg] if colon else [])
  if not isinstance(config, config_dict.ConfigDict):
    raise ValueError(
      f"{path}: get_config(arg='') must return a ConfigDict, got "
      f"{type(config).__name__}"
    )
  return config.lock()


def chosen_name(flag_values: flags.FlagValues = flags.FLAGS) -> str:
  """The value of --config as it was given; of a path, the file's stem."""
  name, colon, arg = flag_values["config"].parser.chosen.partition(":")
  return pathlib.Path(name).stem + colon + arg


def is_given(field: str, flag_values: flags.FlagValues = flags.FLAGS) -> bool:
  """Whether a flag --config.<field> was given."""
  return field in config_flags.get_override_values(flag_values["config"])


def define_config(
  flag_values: flags.FlagValues = flags.FLAGS, *, required: bool = True
) -> None:
  """Defines --config and --list_configs; --config may be left out or not."""
  try:
    config_flags.DEFINE_config_file(
      "config",
      None,
      "Config: a name, name:arg (hope_tiny:smoke), or the path of a .py file "
      "or of a run's config.json.",
      flag_values=flag_values,
    )
  except (flags.Error, ValueError) as error:  # It reads --flagfile by now.
    _exit(error)
  flag_values["config"].parser = _ConfigByName("config")
  flag_values["config"].parser.required = required
  flags.DEFINE_boolean(
    "list_configs",
    False,
    "Print the names of all configs and stop.",
    flag_values=flag_values,
  )


def parse(
  argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS
) -> list[str]:
  """Reads the flags, for `app.run(main, flags_parser=parse)`.

  Args:
    argv: the command line, its first element the program.
    flag_values: the defined flags; --config is required where it is defined.

  Returns:
    The program's name, for absl.

  Raises:
    SystemExit: 0 after --list_configs; after a mistake its one sentence.
  """
  if "config" in flag_values and "--list_configs" in argv:
    print("\n".join(config_names()))
    sys.exit(0)
  try:
    # A command may have a list of names of its own.
    if "config" in flag_values and isinstance(
      flag_values["config"].parser, _ConfigByName
    ):
      _check_config(
        flag_values.read_flags_from_files(argv, force_gnu=False),
        flag_values["config"].parser.required,
      )
    rest = flag_values(argv)
    _check_numbers(flag_values)
    _expand_homes(flag_values)
  except (flags.Error, ValueError) as error:
    _exit(error)
  if len(rest) > 1:
    known = rest[1].partition(":")[0] in config_names()
    hint = f"; did you mean --config={rest[1]}?" if known else ""
    sys.exit(f"FATAL Flags parsing error: unexpected {rest[1]!r}{hint}")
  return rest


def _exit(error: Exception) -> NoReturn:
  """Ends the command with the sentence of a mistake in its flags."""
  sentence = " ".join(str(error).split()).removeprefix("ERROR:: ")
  sys.exit(f"FATAL Flags parsing error: {sentence}")


def _expand_homes(flag_values: flags.FlagValues) -> None:
  """Takes "~" for a home folder where a flag is a path.

  A shell does so at the beginning of a word, and not after --workdir=.

  Raises:
    ValueError: there is no such user.
  """
  for name in flag_values:
    value = flag_values[name].value
    if name in _TEXTS or name.startswith("config."):
      continue
    if isinstance(value, str):
      flag_values[name].value = _expanded(value)
    elif isinstance(value, list):
      flag_values[name].value = [_expanded(x) for x in value]


def _expanded(value: Any) -> Any:
  is_home = isinstance(value, str) and value.startswith("~")
  return str(files.expand(value)) if is_home else value


def _check_numbers(flag_values: flags.FlagValues) -> None:
  """Raises ValueError for a number that is none, or that int32 does not hold.

  Fields of a config have ranges of their own.
  """
  for name in flag_values:
    value = flag_values[name].value
    if name.startswith("config."):
      continue
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f"flag --{name} must be a finite number, got {value}")
    most = _SEEDS if name == "seed" else _LARGEST
    if type(value) is int and not -_LARGEST <= value <= most:
      raise ValueError(
        f"flag --{name} must be a whole number of at most {most}, got {value}"
      )


class _ConfigByName(config_flags.config_flags.ConfigFileFlagParser):
  """The stock parser takes every name for a path and hides what fails."""

  chosen = ""  # The value that was parsed last.
  required = True

  def parse(self, value: str) -> config_dict.ConfigDict:
    """Loads the config; absl turns its ValueError into a sentence."""
    self.chosen = value
    return load_config(value)


def _check_config(argv: Sequence[str], required: bool) -> None:
  """Checks that --config is there, and that the keys of all overrides exist.

  Absl and ml_collections would raise an AttributeError of their own for an
  unknown key, without the keys beside it.
  """
  if {"--help", "--helpshort", "--helpfull", "-?", "-h"} & set(argv):
    return
  chosen = [(i, m) for i, a in enumerate(argv) if (m := _CHOICE.match(a))]
  if not chosen and not required:
    return
  if not chosen:
    bare = [a for a in argv[1:] if a.partition(":")[0] in config_names()]
    hint = f"Did you mean --config={bare[0]}? " if bare else ""
    raise ValueError(
      f"--config is required. {hint}Known: {', '.join(config_names())}"
    )
  index, match = chosen[-1]
  value = match["value"] or "".join(argv[index + 1 : index + 2])
  try:
    config = load_config(value)
  except ValueError as error:
    raise ValueError(f"flag --config={value}: {error}") from error
  for arg in argv:
    override = _OVERRIDE.match(arg)
    if override:
      check_key(config, override["path"])


def check_key(config: config_dict.ConfigDict, path: str) -> None:
  """Raises ValueError unless `path`, as a.b.c, is a field of the config."""
  node, parents = config, []
  for key in path.split("."):
    where = ".".join(parents) or "the config"
    if not isinstance(node, config_dict.ConfigDict):
      raise ValueError(f"unknown config key: {path!r}; {where} is a field")
    if key not in node:
      raise ValueError(
        f"unknown config key: {path!r}. {_did_you_mean(key, node)}"
        f"Keys of {where}: {', '.join(node)}"
      )
    node = node[key]
    parents.append(key)
  if isinstance(node, config_dict.ConfigDict):
    raise ValueError(
      f"config key {path!r} is a group; set one of its keys: {', '.join(node)}"
    )


def _of_run(path: pathlib.Path) -> config_dict.ConfigDict:
  """The config of a run, of its config.json: data, and no code."""
  from nl_jax.train import files as run_files

  if not path.is_file():
    raise ValueError(f"no config file {str(path)!r}")
  return config_dict.ConfigDict(
    _with_tuples(run_files.read_config_file(path)["config"])
  ).lock()


def _with_tuples(value: Any) -> Any:
  """JSON values with tuples in the place of lists, as configs have them."""
  if isinstance(value, dict):
    return {key: _with_tuples(x) for key, x in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _did_you_mean(name: str, known: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, list(known))
  return f"Did you mean {' or '.join(close)}? " if close else ""


def _run_file(path: pathlib.Path, args: Sequence[str]) -> object:
  """What get_config of a file returns; the file's errors become a sentence."""
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise ValueError(f"{path} defines no get_config(arg='')")
    return module.get_config(*args)
  except ValueError:  # A builder's own sentence.
    raise
  except _FILE_ERRORS as error:
    where = f"{path}:{_line_of(error, path)}"
    raise ValueError(
      f"the config file does not run: {where}: {type(error).__name__}: {error}"
    ) from error


def _line_of(error: Exception, path: pathlib.Path) -> int:
  """The line of a config file that an error came from."""
  if isinstance(error, SyntaxError):
    return error.lineno or 0
  frames = traceback.extract_tb(error.__traceback__)
  names = (str(path), str(path.resolve()))
  lines = [frame.lineno for frame in frames if frame.filename in names]
  return lines[-1] if lines else 0
