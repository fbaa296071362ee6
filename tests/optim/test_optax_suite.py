"""optax's own shared test bodies, unmodified, on our factories.

The modules inside the installed optax are parsed, their lists of optimizers
replaced by ours, and their test cases run. Nothing else is touched: bodies and
tolerances are optax's.
"""

import ast
import importlib.util
import os
import pathlib
import re
import sys
import types
import unittest

import jax
import optax
import pytest
from absl.testing import parameterized
from battery import bound_multi_frequency

from nl_jax import optim

_ROOT = pathlib.Path(optax.__file__).parent


def _factories():
  """Our factories, and variants of them under names of their own."""

  def m3_muon(
    learning_rate: optax.ScalarOrSchedule, slow_every: int = 10
  ) -> optax.GradientTransformation:
    return optim.m3(learning_rate, slow_every=slow_every, second_moment=None)

  def delta_implicit(
    learning_rate: optax.ScalarOrSchedule, eta_decay: float = 0.1
  ) -> optax.GradientTransformation:
    return optim.delta_momentum(
      learning_rate,
      eta_decay=eta_decay,
      decay="implicit",
      granularity="element",
      key="raw",
    )

  def m3_grad(
    learning_rate: optax.ScalarOrSchedule,
  ) -> optax.GradientTransformation:
    return optim.m3(learning_rate, second_moment="grad")

  return {
    "m3": optim.m3,
    "m3_muon": m3_muon,
    "m3_grad": m3_grad,
    "m3_paper": optim.m3_paper,
    "delta_momentum": optim.delta_momentum,
    "delta_implicit": delta_implicit,
    "delta_momentum_paper": optim.delta_momentum_paper,
    "deep_momentum": optim.deep_momentum,
    "adam_memory": optim.adam_memory,
    "adagrad_memory": optim.adagrad_memory,
    "multi_frequency": bound_multi_frequency,
  }


# Learning rates whose limit cycle is below optax's tolerance of 3e-2.
_CONTRIB = [
  ("m3", {"learning_rate": 1e-2}),
  ("m3_muon", {"learning_rate": 1e-2}),
  ("m3_grad", {"learning_rate": 1e-2}),
  ("m3_paper", {"learning_rate": 1e-3}),
  ("delta_momentum", {"learning_rate": 1e-3}),
  ("delta_implicit", {"learning_rate": 1e-3}),
  ("delta_momentum_paper", {"learning_rate": 1e-3}),
  ("deep_momentum", {"learning_rate": 1e-3, "vector_rule": "mlp"}),
  ("adam_memory", {"learning_rate": 1e-2}),
  ("adagrad_memory", {"learning_rate": 1.0}),
  ("multi_frequency", {"learning_rate": 1e-2}),
]
_ALIAS = [
  ("m3", {"learning_rate": 1e-2}),
  ("delta_momentum", {"learning_rate": 1e-3}),
  ("adam_memory", {"learning_rate": 1e-1}),
]

_SHRINKS = "its step shrinks like 1/sqrt(t) and grows like 1/|g| (spec 2.6)"
_UNSTABLE = "unstable where |G|^2 > 1 + alpha: these targets start there (2.3)"
_TARGETS = ("parabola", "rosenbrock", "matrix_parabola", "mixed_tensor_target")
# (optimizer, target) -> the mathematical reason why it cannot converge.
_EXPECTED = {
  **{("m3_paper", t): _SHRINKS for t in _TARGETS},
  **{("delta_momentum_paper", t): _UNSTABLE for t in _TARGETS},
  ("m3_grad", "mixed_tensor_target"): (
    "orthogonal numerator over raw second moments: a step of size ~ 1/|g|, "
    "which diverges as the gradient vanishes (2.6)"
  ),
}


def _assigns(node, name):
  targets = getattr(node, "targets", [getattr(node, "target", None)])
  return any(isinstance(t, ast.Name) and t.id == name for t in targets)


def _load(path, replace, empty=()):
  """Executes a test module of optax with the lists named replaced."""
  source = _ROOT / path
  if not source.exists():
    pytest.skip(f"this optax ships no {path}", allow_module_level=True)
  tree = ast.parse(source.read_text())
  body, done = [], set()
  for node in tree.body:
    name = next((n for n in (*replace, *empty) if _assigns(node, n)), None)
    if name is None:
      body.append(node)
    elif isinstance(node, ast.AugAssign):
      continue
    elif name in done:
      body.append(node)  # E.g. its conversion to a tuple.
    else:
      done.add(name)
      value = "_NL_ROWS" if name in replace else "[]"
      body += ast.parse(f"{name} = {value}").body
  missing = {*replace, *empty} - done
  assert not missing, f"optax changed: {missing} not found in {path}"
  module = types.ModuleType("nl_" + source.stem)
  module._NL_ROWS = next(iter(replace.values()))
  sys.modules[module.__name__] = module
  flags = os.environ["XLA_FLAGS"]
  exec(compile(ast.Module(body, []), str(source), "exec"), module.__dict__)
  # sharding_test sets it for itself: commands of other tests would inherit it.
  os.environ["XLA_FLAGS"] = flags
  return module


def _rows(table):
  return [{"opt_name": n, "opt_kwargs": dict(kw)} for n, kw in table]


def _stub_sklearn():
  """alias_test imports sklearn for its L-BFGS tests alone."""
  if importlib.util.find_spec("sklearn"):
    return
  for name in ("sklearn", "sklearn.datasets", "sklearn.linear_model"):
    sys.modules.setdefault(name, types.ModuleType(name))
  sklearn = sys.modules["sklearn"]
  sklearn.datasets = sys.modules["sklearn.datasets"]
  sklearn.linear_model = sys.modules["sklearn.linear_model"]


def _cases(case):
  names = unittest.TestLoader().getTestCaseNames(case)
  return [case(name) for name in names]


def _contrib():
  for name, factory in _factories().items():
    setattr(optax.contrib, name, factory)
  module = _load(
    "contrib/_common_test.py",
    {"_MAIN_OPTIMIZERS_UNDER_TEST": _rows(_CONTRIB)},
    ["_BASE_OPTIMIZERS"],
  )
  return _cases(module.ContribTest)


def _alias():
  for name, factory in _factories().items():
    setattr(optax._src.alias, name, factory)
  _stub_sklearn()
  module = _load(
    "_src/alias_test.py", {"_OPTIMIZERS_UNDER_TEST": tuple(_rows(_ALIAS))}
  )
  # Its explicit-dtype test is about optax's own sgd and adam.
  return [c for c in _cases(module.AliasTest) if "explicit" not in c.id()]


def _sharding():
  make = {
    name: factory(1e-2)
    for name, factory in _factories().items()
    if name != "multi_frequency"
  }
  make["multi_frequency"] = bound_multi_frequency(1e-2)
  for mode in ("cond", "select"):
    make[f"multi_frequency_{mode}"] = optim.multi_frequency(
      optax.adamw(1e-2),
      {"all": 4},
      lambda p: jax.tree.map(lambda _: "all", p),
      mode=mode,
    )
  module = _load("_src/sharding_test.py", {"OPTIMIZERS": make})
  cases = _cases(module.ShardingTest)
  return [c for c in cases if "microbatch" not in c.id()]


def _arguments(case):
  """The values that parameterized bound to a test method."""
  method = getattr(type(case), case._testMethodName)
  text = getattr(method, "__x_params_repr__", "")
  return re.sub(r"<function (\w+) at \w+>", r"\1", text)


def _name(case):
  return f"{case._testMethodName} {_arguments(case)}"


def _reason(case):
  """Why this case must fail, or None."""
  text = _name(case)
  if "test_optimizers" not in text or "target" not in text:
    return None
  for (name, target), reason in _EXPECTED.items():
    if f"opt_name='{name}'" in text and f"_setup_{target}," in text + ",":
      return reason
  return None


_ALL = [*_contrib(), *_alias(), *_sharding()]


@pytest.mark.parametrize("case", _ALL, ids=[_name(c) for c in _ALL])
def test_optax(case, monkeypatch):
  if "Sharding" in type(case).__name__:
    # They compare version strings, and skip on "0.10.2" < "0.7.2".
    monkeypatch.setattr(jax, "__version__", "9")
  with jax.numpy_rank_promotion("allow"):  # Their bodies broadcast freely.
    result = unittest.TestResult()
    case.run(result)
  problems = [*result.failures, *result.errors]
  problems = [text for _, text in problems]
  reason = _reason(case)
  if reason is not None:
    assert problems, f"expected to fail, but passed: {reason}"
    assert all("converges" in p or "close" in p for p in problems), problems
    return
  assert not problems, "\n".join(problems)
  if result.skipped:
    pytest.skip(result.skipped[0][1])


assert issubclass(type(_ALL[0]), parameterized.TestCase)
