"""docs/errors.md: every command of its tables says what stands there."""

import os
import pathlib
import re
import shlex

import pytest

from tests.experiments import forked

# One worker runs the commands.
pytestmark = pytest.mark.xdist_group("errors")
PAGE = forked.ROOT / "docs" / "errors.md"
FIRST = (
  "lm --config=transformer_tiny:smoke --workdir=runs/done "
  "--config.train.steps=2 --config.eval.batches=1"
)
# A sentence may hold a bar: only a bar between spaces ends a cell.
ROW = re.compile(r"^\| `(?P<command>[^`]+)` \| `(?P<sentence>[^`]+)` \|$")


def rows():
  found = [ROW.match(x) for x in PAGE.read_text("utf-8").splitlines()]
  return [(m["command"], m["sentence"]) for m in found if m]


def make_files(folder: pathlib.Path) -> None:
  (folder / "text.txt").write_text("some text\n" * 400)
  (folder / "latin.txt").write_bytes(b"caf\xe9")
  (folder / "empty.txt").write_text("")
  (folder / "empty").mkdir()
  (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
  (folder / "body.jsonl").write_text('{"body": "a"}\n')
  (folder / "texts").mkdir()
  (folder / "texts" / "a.txt").write_text("some text\n")
  (folder / "deep.jsonl").write_text('{"text": "a", "b": ' + "[" * 200_000)
  os.mkfifo(folder / "pipe")
  (folder / "words.model").write_text("no model")
  (folder / "words.json").write_text(
    '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'
  )
  (folder / "broken.py").write_text(
    'def get_config(arg=""):\n  return nothing\n'
  )
  (folder / "strange").mkdir()
  (folder / "strange" / "metrics.jsonl").write_text("")
  for name in ("damaged", "other", "later", "cut"):
    (folder / name).mkdir()
  (folder / "damaged" / "config.json").write_text("null")
  (folder / "other" / "config.json").write_text(
    '{"config": {"model": {"flavour": 1}}, "fingerprint": ""}'
  )
  (folder / "cut" / "manifest.json").write_text('{"format": 1')
  (folder / "later" / "config.json").write_text(
    '{"format": 3, "config": {}, "fingerprint": ""}'
  )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  folder = tmp_path_factory.mktemp("errors")
  make_files(folder)
  commands = [FIRST, *(command for command, _ in rows())]
  results = forked.run([shlex.split(c) for c in commands], folder)
  assert results[0].returncode == 0, results[0].stderr
  return folder, dict(zip(commands, results))


def test_the_tables_are_read():
  assert len(rows()) > 55
  named = re.split(r"made by\s+`", PAGE.read_text("utf-8"))[1].split("`")[0]
  assert " ".join(named.split()) == FIRST


@pytest.mark.parametrize("command,sentence", rows())
def test_a_mistake_is_answered(done, command, sentence):
  _, results = done
  got = results[command]
  assert got.returncode == 1, got.stderr
  assert "Traceback" not in got.stderr
  said = got.stderr.strip().splitlines()[-1]
  pattern = ".*".join(map(re.escape, sentence.split("…")))
  assert re.search(pattern, said), said


def test_nothing_is_made_or_changed(done):
  folder, _ = done
  assert not (folder / "runs" / "new").exists()
  assert sorted(p.name for p in (folder / "runs").iterdir()) == ["done"]
  assert [p.name for p in (folder / "strange").iterdir()] == ["metrics.jsonl"]
  assert not list((folder / "empty").iterdir())
