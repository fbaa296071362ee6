"""The launch scripts, with the cloud's commands only saying what they got."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from tests.experiments import test_beam, test_commands

ROOT = test_commands.ROOT
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
PAGE = ROOT / "docs" / "launch.md"

# Writes down its arguments, a line at once, since several run side by side.
# `describe` and `storage ls` answer by the next line of a file; ssh runs the
# command here, as on a worker.
FAKE = r"""#!/usr/bin/env bash
name=$(basename "$0")
line=$(printf "%q " "$name" "$@")
echo "$line" >> "$LOG"
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$name $*" in
  *queued-resources\ describe*) next "$STATES" ;;
  *storage\ ls*) [[ $(next "$ENDS") == done ]] ;;
  *storage\ cp\ -*) cat > /dev/null ;;
  *storage\ cat*metrics*) printf 'old\nnew\n' ;;
  *tpu-vm\ ssh*)
    for x in "$@"; do
      if [[ $x == --command=* && -n $WORKERS ]]; then
        cd "$HOME" && bash -c "${x#--command=}"
      fi
    done ;;
  sudo*) "$@" ;;
  systemctl*) exit 3 ;;
esac
"""
NAMES = (
  "gcloud", "xpk", "docker", "kubectl", "sudo", "systemctl", "systemd-run",
  "mountpoint", "python",
)  # fmt: skip


@pytest.fixture
def cloud(tmp_path):
  """Runs a script where the cloud's commands are fakes."""
  (tmp_path / "bin").mkdir()
  for name in NAMES:
    path = tmp_path / "bin" / name
    path.write_text(FAKE)
    path.chmod(0o755)
  (tmp_path / "nl_jax").symlink_to(ROOT)
  log = tmp_path / "log"

  def run(script, command, states=(), ends=(), status=0, workers="", **more):
    log.write_text("")
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    (tmp_path / "ends").write_text("\n".join(ends) + "\n")
    env = {
      "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(log),
      "STATES": str(tmp_path / "states"), "ENDS": str(tmp_path / "ends"),
      "HOME": str(tmp_path), "POLL": "0", "WORKERS": workers, "PROJECT": "p",
    }  # fmt: skip
    done = subprocess.run(
      ["bash", str(LAUNCH / script), command], env=env | more,
      capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    lines = [shlex.split(line) for line in log.read_text().splitlines()]
    return done, lines

  return run


def flags_of(line, module="experiments.lm"):
  return line[line.index(module) + 1 :]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_sound(script):
  subprocess.run(["bash", "-n", str(script)], check=True)
  if shutil.which("shellcheck"):
    subprocess.run(["shellcheck", "-x", script], check=True, cwd=ROOT)
  assert max(map(len, script.read_text().splitlines())) <= 80


def test_the_extras_that_are_installed_exist():
  known = re.findall(r'"(\w+)": [\[_]', (ROOT / "setup.py").read_text())
  for path in LAUNCH.iterdir():
    for extras in re.findall(r"\[([a-z,]+)\]'", path.read_text()):
      assert {*extras.split(",")} <= {*known}, path


def test_workers_have_the_python_that_is_asked_for(cloud):
  _, lines = cloud("tpu.sh", "install", PYTHON="3.13")
  assert any("PYTHON=3.13 bash" in x for line in lines for x in line)
  _, lines = cloud("xpk.sh", "image", PYTHON="3.13")
  assert "--build-arg=PYTHON=3.13" in lines[0]
  build = (LAUNCH / "tpu.Dockerfile").read_text()
  assert "ARG PYTHON\nFROM python:${PYTHON}-slim\n" in build


def test_a_slice_is_asked_for_and_waited_for(cloud):
  states = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
  _, lines = cloud("tpu.sh", "create", states)
  assert lines[0][:6] == [
    "gcloud", "compute", "tpus", "queued-resources", "create", "nl-jax",
  ]  # fmt: skip
  for flag in ("--node-id=nl-jax", "--spot", "--zone=us-west4-a",
               "--accelerator-type=v5litepod-8", "--project=p"):  # fmt: skip
    assert flag in lines[0]
  assert len(lines) == 1 + len(states)
  done, _ = cloud("tpu.sh", "create", ("FAILED",), status=1)
  assert "the request nl-jax is FAILED" in done.stderr


def test_several_slices_are_one_request_and_a_command_on_each(cloud):
  _, lines = cloud("tpu.sh", "create", ("ACTIVE",), SLICES="3", SPOT="0")
  assert {"--node-count=3", "--node-prefix=nl-jax"} <= {*lines[0]}
  assert not {"--spot", "--node-id=nl-jax"} & {*lines[0]}
  _, lines = cloud("tpu.sh", "stop", SLICES="3")
  asked = sorted(line[5] for line in lines)
  assert asked == ["nl-jax-0", "nl-jax-1", "nl-jax-2"]
  assert all("--worker=all" in line for line in lines)


def test_a_slice_that_was_taken_away_is_asked_for_again(cloud):
  """Taken away once before the first look, and once in the run."""
  done, lines = cloud(
    "tpu.sh", "keep",
    states=("SUSPENDED", "PROVISIONING", "ACTIVE", "ACTIVE", "PREEMPTED",
            "ACTIVE"),
    ends=("", "", "", "done"),
  )  # fmt: skip
  words = [
    next(w for w in ("describe", "ls", "delete", "create", "cp", "ssh")
         if w in line)
    for line in lines
  ]  # fmt: skip
  assert words == [
    "ls", "describe", "delete", "create", "describe", "describe",
    "cp", "ssh", "ssh",  # Install, train.
    "ls", "describe",  # It runs.
    "ls", "describe", "delete", "create", "describe", "cp", "ssh", "ssh",
    "ls",
  ]  # fmt: skip
  assert "done: gs://p-nl-jax/runs/hope_1b3/results.json" in done.stdout
  assert "nl-jax is SUSPENDED" in done.stderr


def test_what_fails_in_keep_is_tried_again(cloud):
  _, lines = cloud(
    "tpu.sh", "keep", states=("FAILED", "FAILED", "FAILED", "ACTIVE"),
    ends=("", "", "done"),
  )  # fmt: skip
  assert sum("create" in line for line in lines) == 2


@pytest.fixture
def trained(cloud):
  """What systemd is asked to run on a worker."""
  _, lines = cloud(
    "tpu.sh", "train", workers="1", CONFIG="transformer_tiny:smoke",
    ARGS="--config.train.steps=7 --config.data.path=a:b=0.5,c:=1",
    DATA="prepared", RUN="one two",
  )  # fmt: skip
  return lines


def test_the_run_of_a_worker(trained):
  mounted, run = [x for x in trained if x[0] == "systemd-run"]
  assert mounted[-2] == "p-nl-jax" and mounted[-1].endswith("/bucket")
  assert "--metadata-cache-ttl-secs=0" in mounted
  # systemd stops units in the reverse order: the bucket outlives the run.
  assert "--unit=nl_jax_bucket" in mounted
  assert "--property=After=nl_jax_bucket.service" in run
  flags = flags_of(run)
  code = next(x for x in flags if x.startswith("--preempted_exit_code="))
  force = "--property=RestartForceExitStatus=" + code.partition("=")[2]
  assert force in run
  assert "--config.data.path=a:b=0.5,c:=1" in flags
  assert any(x.endswith("/bucket/runs/one two") for x in flags)
  (copied,) = [x for x in trained if "rsync" in x]
  assert "gs://p-nl-jax/prepared" in copied


def test_experiments_lm_knows_the_flags(trained, cloud, tmp_path):
  _, lines = cloud(
    "xpk.sh", "train", CONFIG="transformer_tiny:smoke", RUN="one",
    ARGS="--config.train.steps=7",
  )  # fmt: skip
  command = next(x for x in lines[0] if x.startswith("--command="))
  words = shlex.split(command.partition("=")[2])
  assert words[:2] == ["exec", "python"]
  workers = [x for x in trained if x[0] == "systemd-run"][1]
  for flags in (flags_of(workers), flags_of(words)):
    flags = [x for x in flags if not x.startswith("--config.data.path")]
    done = test_commands.run("lm", *flags, "--describe", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--config.train.steps=7" in done.stdout


def test_a_job_on_gke_restarts_on_what_a_run_exits_with(cloud):
  _, lines = cloud("xpk.sh", "train", SLICES="2", TYPE="v5litepod-256")
  (line,) = lines
  for flag in ("--num-slices=2", "--tpu-type=v5litepod-256",
               "--restart-on-exit-codes=1", "--max-restarts=100"):  # fmt: skip
    assert flag in line
  # Of xpk's own codes, besides 127 to 255.
  assert any("--preempted_exit_code=42" in x for x in line)


def test_experiments_prepare_knows_the_flags_of_dataflow(cloud):
  _, lines = cloud("dataflow.sh", "prepare", WORKERS="9")
  flags = flags_of(lines[0], "experiments.prepare")
  assert "--out=gs://p-nl-jax/prepared" in flags
  beam = next(x for x in flags if x.startswith("--beam="))
  assert "--runner=DataflowRunner" in beam and "--max_num_workers=9" in beam
  flags = [x for x in flags if not x.startswith("--tokenizer")]
  said = test_beam.refused(*flags, "--tokenizer=bytes")
  assert "--beam needs Apache Beam" in said


def test_the_newest_metrics_are_shown(cloud):
  done, _ = cloud("tpu.sh", "watch")
  assert done.stdout == "new\n"


@pytest.mark.parametrize("command,sentence", [
  ("creat", "error: creat is none of: bucket create"),
  ("", "error: no command is none of"),
])  # fmt: skip
def test_an_unknown_command_is_refused(cloud, command, sentence):
  done, lines = cloud("tpu.sh", command, status=1)
  assert sentence in done.stderr and not lines


def test_a_project_is_required(cloud):
  done, lines = cloud("xpk.sh", "train", status=1, PROJECT="")
  assert "error: set PROJECT" in done.stderr and not lines


def test_the_page_names_commands_and_variables_that_exist():
  text = PAGE.read_text("utf-8")
  found = re.findall(r"bash experiments/launch/(\w+)\.sh (\w+)", text)
  assert len(found) > 10
  for script, command in found:
    body = (LAUNCH / f"{script}.sh").read_text()
    assert re.search(rf'^dispatch ".*\b{command}\b', body, re.M), command
  defined = "".join(path.read_text() for path in SCRIPTS)
  for name in re.findall(r"\b([A-Z]{3,})=", text):
    assert f'"${{{name}:=' in defined, name


def test_a_workdir_in_a_store_is_refused(tmp_path):
  done = test_commands.run(
    "lm", "--config=hope_tiny", "--workdir=gs://bucket/run", cwd=tmp_path
  )
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "--workdir=gs://bucket/run is in a store" in done.stderr
  assert not list(pathlib.Path(tmp_path).iterdir())
