"""From files to a running training in three commands, stopped anywhere."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from nl_jax.data import tokenizers
from tests.data import test_preparation
from tests.experiments import test_commands

COMMAND = [sys.executable, "-m", "experiments.prepare"]


def start(*args):
  return subprocess.Popen(
    [*COMMAND, *args], cwd=test_commands.ROOT, stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True, start_new_session=True,
    # A background job's children would ignore Ctrl-C.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


def finish(process):
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  return out


def status_of(pid):
  """(state, parent) of a process; None where there is none."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except FileNotFoundError:
    return None
  state, parent = stat.rpartition(")")[2].split()[:2]
  return state, int(parent)


def alive(pid):
  return (status_of(pid) or ("Z",))[0] != "Z"


def children(parent):
  pids = [int(p.name) for p in pathlib.Path("/proc").glob("[0-9]*")]
  return [pid for pid in pids if (status_of(pid) or (0, 0))[1] == parent]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """Some megabytes in a few files."""
  folder = tmp_path_factory.mktemp("corpus")
  lines = [json.dumps({"text": text}) for text in test_preparation.texts(4000)]
  for i in range(12):
    (folder / f"{i}.jsonl").write_text("\n".join(lines) + "\n")
  return folder


def args_of(corpus, out):
  return (
    "--source=jsonl", f"--path={corpus}", f"--out={out}",
    "--sequence_length=64", "--shard_megabytes=1",
  )  # fmt: skip


def test_killed_twice_gives_the_same_manifest_with_any_workers(
  corpus, tmp_path
):
  whole = start(*args_of(corpus, tmp_path / "whole"), "--workers=1")
  killed = tmp_path / "killed"
  for done in (1, 2):
    process = start(*args_of(corpus, killed), "--workers=2")
    limit = time.monotonic() + 60
    while len(list((killed / "notes").glob("0*.json"))) < done:
      assert process.poll() is None and time.monotonic() < limit
      time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "manifest.json").exists()
  said = finish(start(*args_of(corpus, killed), "--workers=2"))
  assert "shards were there" in said
  manifests = [
    [line for line in text.splitlines() if line.startswith("manifest: ")]
    for text in (finish(whole), said)
  ]
  assert manifests[0] == manifests[1] and manifests[0]
  names = lambda folder: sorted(
    (p.name, p.read_bytes()) for p in folder.glob("*.array_record")
  )
  assert names(tmp_path / "whole") == names(killed)
  assert not list(killed.glob("manifest*.tmp"))


def test_workers_end_with_their_command_and_no_second_one_starts(
  corpus, tmp_path
):
  out = tmp_path / "out"
  process = start(*args_of(corpus, out), "--workers=2")
  while not list((out / "notes").glob("0*.json")):
    assert process.poll() is None
    time.sleep(0.002)
  # Stopped, so that it still holds the folder when the second one comes.
  process.send_signal(signal.SIGSTOP)
  _, err = (second := start(*args_of(corpus, out))).communicate(timeout=60)
  assert second.returncode == 1
  assert f"another process is preparing {out}" in err
  workers = children(process.pid)
  assert len(workers) >= 2
  process.kill()
  process.communicate(timeout=60)
  limit = time.monotonic() + 30
  while any(map(alive, workers)):
    assert time.monotonic() < limit
    time.sleep(0.01)


def test_ctrl_c_stops_all_processes(corpus, tmp_path):
  many = tmp_path / "many"
  many.mkdir()
  for i in range(120):  # Work for seconds after the first note.
    shutil.copy(corpus / "0.jsonl", many / f"{i}.jsonl")
  process = start(*args_of(many, tmp_path / "out"), "--workers=2")
  while not list((tmp_path / "out" / "notes").glob("0*.json")):
    assert process.poll() is None
    time.sleep(0.002)
  os.killpg(process.pid, signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 130, err
  assert "stopped by Ctrl-C" in err and "Traceback" not in err
  assert "--source=jsonl" not in err and " shards, 2 workers" in err


def test_three_commands_from_files_to_training(corpus, tmp_path):
  one = corpus / "0.jsonl"
  model, out = tmp_path / "words.model", tmp_path / "out"
  first = finish(start(
    f"--train_tokenizer={model}", "--vocab_size=400", f"--path={one}",
  ))  # fmt: skip
  assert "400 pieces" in first and "--tokenizer=" in first
  words = tokenizers.load(str(model))
  again = tmp_path / "again.model"
  finish(start(
    f"--train_tokenizer={again}", "--vocab_size=400", "--source=jsonl",
    f"--path={one}",
  ))  # fmt: skip
  assert again.read_bytes() == model.read_bytes()
  for text in ("abc def", "ünïcode 日本\n", "  two  spaces "):
    assert words.decode(words.encode(text)) == text
  second = finish(start(
    "--source=jsonl", f"--path={one}", f"--out={out}", "--workers=1",
    f"--tokenizer={model}", "--config=transformer_tiny:smoke",
  ))  # fmt: skip
  command = [line for line in second.splitlines() if line.startswith("next:")]
  args = command[0].split("experiments.lm ")[1].split()
  assert "--config.model.vocab_size=448" in args
  third = test_commands.run(
    "lm", *args, f"--workdir={tmp_path / 'run'}", "--config.train.steps=2",
    "--config.eval.batches=1",
  )  # fmt: skip
  assert third.returncode == 0, third.stderr
  assert "data: prepared" in third.stderr and "nat per byte" in third.stdout


@pytest.mark.parametrize("name,extra", [
  ("datasets", "hf"), ("pyarrow", "train"), ("tokenizers.models", "train"),
])  # fmt: skip
def test_a_missing_library_names_what_to_install(name, extra):
  code = (
    "import sys; from absl import flags; from experiments.cli import command\n"
    "flags.FLAGS(['x'])\n"
    "def main():\n"
    f"  raise ModuleNotFoundError(name={name!r})\n"
    "sys.exit(command._guarded(main))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=test_commands.ROOT, capture_output=True,
    text=True,
  )  # fmt: skip
  assert done.returncode == 1
  top = name.split(".")[0]
  assert f"{top} is not installed: run `pip install -e .[{extra}]`" in (
    done.stderr
  )


@pytest.mark.parametrize("args,sentence", [
  ((), "--path is required"),
  (("--path=x",), "--out is required"),
  (("--path=x", "--out=y"), "--sequence_length is required"),
  (("--path=x", "--out=y", "--config=hope_tinny"), "Did you mean"),
  (("--path=x", "--out=y", "--config=hope_1b3"), "--tokenizer is required"),
  (("--path=x", "--out=y", "--sequence_length=8", "--validation_percent=0"),
   "--validation_percent must be between 0 and 100, got 0"),
  (("--path=x", "--out=y", "--sequence_length=8"), "nothing at --path='x'"),
  (("--path=x", "--out=y", "--sequence_length=8", "--source=csv"),
   "Known: text, jsonl, parquet"),
  (("--path=setup.py", "--out=y", "--sequence_length=8"),
   "--path='setup.py' says no --source; set --source to one of"),
  (("--path=setup.py", "--source=text", "--out=y", "--sequence_length=8",
    "--alignment=3"), "must be a multiple"),
  (("--path=setup.py", "--source=text", "--out=y", "--sequence_length=8",
    "--tokenizer=words"), "no --tokenizer 'words'"),
  (("--path=setup.py", "--train_tokenizer=README.md"), "README.md exists"),
  (("--path=setup.py", "--source=text", "--train_tokenizer=no.model",
    "--vocab_size=9"), "must be at least 300"),
  (("--path=setup.py", "--source=text", "--train_tokenizer=no.model",
    "--vocab_size=30000"), "pieces at most; give --vocab_size="),
])  # fmt: skip
def test_mistakes_are_one_sentence(args, sentence):
  process = start(*args)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 1
  assert sentence in err and "Traceback" not in err
  assert not pathlib.Path(test_commands.ROOT, "no.model").exists()
