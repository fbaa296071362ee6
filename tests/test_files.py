"""Files that are whole or not there, whatever lies in the folder."""

import os

import pytest

from nl_jax import files


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_file_is_the_old_or_the_new_one(tmp_path, before):
  path = tmp_path / "a.json"
  if before is not None:
    path.write_bytes(before)
  with pytest.raises(OSError, match="full"):
    with files.replacing(path) as file:
      file.write(b"half")
      raise OSError("full")
  assert (path.read_bytes() if path.exists() else None) == before
  assert len(list(tmp_path.iterdir())) == (before is not None)
  files.write(path, "new ü")
  assert path.read_text("utf-8") == "new ü"
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["a.json", ".a.json.tmp"])
def test_a_link_that_was_laid_there_is_not_written_through(tmp_path, name):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  (tmp_path / name).symlink_to(victim)
  files.write(tmp_path / "a.json", "new")
  assert victim.read_text() == "precious"
  assert not (tmp_path / "a.json").is_symlink()
  assert (tmp_path / "a.json").read_text() == "new"


def test_a_lock_is_no_link_and_no_pipe(tmp_path):
  (tmp_path / "victim").write_text("precious")
  (tmp_path / "link").symlink_to("victim")
  (tmp_path / "far").symlink_to("nowhere")
  os.mkfifo(tmp_path / "pipe")
  for name, what in (
    ("link", "a symbolic link"), ("far", "a symbolic link"),
    ("pipe", "not a plain file"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=f"{name} is {what}.*remove it"):
      with files.lock(tmp_path / name):
        pass
  assert (tmp_path / "victim").read_text() == "precious"
  assert not (tmp_path / "nowhere").exists()


def test_one_holds_a_lock(tmp_path):
  with files.lock(tmp_path / "lock"):
    with pytest.raises(files.HeldError):
      with files.lock(tmp_path / "lock"):
        pass
  with files.lock(tmp_path / "lock"):
    pass


def test_a_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert files.expand("~/runs") == tmp_path / "runs"
  assert files.expand("a/~") == files.pathlib.Path("a/~")
  with pytest.raises(ValueError, match="no user of the name 'nobody0'.*./~nob"):
    files.expand("~nobody0/runs")
