"""The workdir: whose it is, and files that are whole."""

import json
import pathlib
import shutil

import pytest

from nl_jax.train import checkpoint, files
from tests.train import stub

CONFIG = {
  "model": {"width": 8, "cms": {"periods": (1, 2)}},
  "mesh": {"fsdp": -1},
  "train": {"steps": 10, "log_every": 2},
}


def changed(**groups) -> dict:
  return {k: v | groups.get(k, {}) for k, v in CONFIG.items()}


def test_same_run_is_taken_again(tmp_path):
  files.claim(tmp_path / "a" / "b", CONFIG, "f")
  about = files.read_json(tmp_path / "a" / "b" / "config.json")
  assert about["config"]["model"]["cms"]["periods"] == [1, 2]
  assert about["versions"]["jax"]
  files.claim(tmp_path / "a" / "b", CONFIG, "f")


def test_free_keys_may_change(tmp_path):
  files.claim(tmp_path, CONFIG, "f")
  config = changed(mesh={"fsdp": 4}, train={"log_every": 5})
  files.claim(tmp_path, config, "f")
  read = files.read_json(tmp_path / "config.json")["config"]
  assert read["mesh"] == {"fsdp": 4}


def test_another_config_is_refused_with_its_keys(tmp_path):
  files.claim(tmp_path, CONFIG, "f")
  before = (tmp_path / "config.json").read_bytes()
  config = changed(
    model={"width": 16, "cms": {"periods": (1, 4)}}, train={"new": 1}
  )
  with pytest.raises(ValueError) as error:
    files.claim(tmp_path, config, "f")
  text = str(error.value)
  assert "model.width: 8 -> 16" in text
  assert "model.cms.periods: [1, 2] -> [1, 4]" in text
  assert "train.new: nothing -> 1" in text
  assert "\n" not in text
  assert (tmp_path / "config.json").read_bytes() == before
  files.claim(tmp_path, config, "f", allow_config_change=True)
  assert (
    files.read_json(tmp_path / "config.json")["config"]["train"]["new"] == 1
  )


def test_other_data_is_refused_in_any_case(tmp_path):
  files.claim(tmp_path, CONFIG, "f" * 64)
  with pytest.raises(ValueError, match="other data"):
    files.claim(tmp_path, CONFIG, "g" * 64, allow_config_change=True)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_foreign_folder_is_refused(tmp_path, name):
  (tmp_path / name).mkdir()
  with pytest.raises(ValueError, match=f"holds {name} but no config.json"):
    files.claim(tmp_path, CONFIG, "f")
  assert [p.name for p in tmp_path.iterdir()] == [name]


def test_folder_with_other_files_is_fine(tmp_path):
  (tmp_path / "log.txt").write_text("hello")
  files.claim(tmp_path, CONFIG, "f")


@pytest.mark.parametrize("damage,words", [
  (b"{", "is not JSON"), (b"\xff", "is not JSON"),
  (b"[" * 10**5, "is not JSON"),
  (b"null", "is not the config.json of a run"), (b"[1]", "is not the config"),
  (b'{"config": null, "fingerprint": "f"}', "is not the config.json"),
  (b'{"config": [], "fingerprint": "f"}', "is not the config.json"),
  (b'{"config": {"model": 3}, "fingerprint": "f"}', "is not the config.json"),
  (b'{"config": {}, "fingerprint": null}', "is not the config.json"),
])  # fmt: skip
def test_a_damaged_config_is_one_sentence(tmp_path, damage, words):
  (tmp_path / "config.json").write_bytes(damage)
  with pytest.raises(ValueError, match=words):
    files.claim(tmp_path, CONFIG, "f")
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_two_at_once_are_refused(tmp_path):
  with files.lock(tmp_path):
    with pytest.raises(ValueError, match="another process is training"):
      with files.lock(tmp_path):
        pass
  with files.lock(tmp_path):
    pass


def test_loop_refuses_another_run_before_it_compiles(tmp_path):
  stub.run(tmp_path, steps=2)
  before = (tmp_path / "metrics.jsonl").read_bytes()
  model = stub.Model()
  with pytest.raises(ValueError, match="model.width: 8 -> 9"):
    stub.run(tmp_path, model=model, config={"model": {"width": 9}}, steps=2)
  with pytest.raises(ValueError, match="other data"):
    stub.run(tmp_path, model=model, fingerprint="g", steps=2)
  assert model.traces == 0
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_workdir_keeps_its_tokenizer(tmp_path, monkeypatch):
  home, run = tmp_path / "home", tmp_path / "home" / "run"
  home.mkdir()
  (home / "tokenizer.json").write_text("words")
  (home / "tokenizer_config.json").write_text("their end")
  monkeypatch.chdir(home)
  config = {"data": {"tokenizer": "tokenizer.json"}}
  files.claim(run, config, "f")
  # Elsewhere, on a copy, and without the file it came from.
  copy = shutil.copytree(run, tmp_path / "copy")
  shutil.rmtree(home)
  monkeypatch.chdir("/")
  kept = checkpoint.read_config(str(copy))["data"]["tokenizer"]
  assert pathlib.Path(kept) == copy / "tokenizer" / "tokenizer.json"
  assert pathlib.Path(kept).read_text() == "words"
  said = files.read_about(copy)["config"]["data"]["tokenizer"]
  assert said == "tokenizer.json"
  (copy / "tokenizer" / "tokenizer_config.json").write_text("another end")
  with pytest.raises(ValueError, match="tokenizer_config.json is not the file"):
    checkpoint.read_config(str(copy))
  (copy / "tokenizer" / "tokenizer.json").unlink()
  with pytest.raises(ValueError, match="tokenizer.json is not the file"):
    checkpoint.read_config(str(copy))


def test_a_link_in_a_shared_folder_is_not_written_through(tmp_path):
  mine, run = tmp_path / "mine", tmp_path / "run"
  mine.write_text("precious")
  run.mkdir()
  for name in (".lock", ".config.json.tmp"):
    (run / name).symlink_to(mine)
  with pytest.raises(ValueError, match="lock is a symbolic link"):
    with files.lock(run):
      pass
  (run / ".lock").unlink()
  with files.lock(run):
    files.claim(run, CONFIG, "f")
  assert mine.read_text() == "precious"
  assert not (run / "config.json").is_symlink()


def test_replaced_file_leaves_nothing_beside_it(tmp_path):
  files.write_json(tmp_path / "a.json", {"x": 1})
  files.write_json(tmp_path / "a.json", {"x": 2})
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
  assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}


def test_a_config_file_of_something_else_is_told(tmp_path):
  (tmp_path / "config.json").write_text('{"a": 1}')
  with pytest.raises(ValueError, match="is not the config.json of a run"):
    files.claim(tmp_path, {}, "")
  with pytest.raises(ValueError, match="is not the config.json of a run"):
    checkpoint.read_config(str(tmp_path))
  assert (tmp_path / "config.json").read_text() == '{"a": 1}'
