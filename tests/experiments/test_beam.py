"""Corpora by Apache Beam: the bytes of the local command, from any store."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from nl_jax.data import partition, prepared, tokenizer_training
from tests.data import test_documents, test_preparation
from tests.experiments import test_commands

with_beam = pytest.mark.skipif(
  importlib.util.find_spec("apache_beam") is None,
  reason="apache_beam is not installed: the extra `beam`, an environment of "
  "its own",
)


def tree(folder):
  """Name and content of each file, hidden ones left out."""
  return {
    p.relative_to(folder).as_posix(): p.read_bytes()
    for p in folder.rglob("*")
    if p.is_file() and not p.name.startswith(".")
  }


def make(path, out, kind="jsonl", options="", **changes):
  from experiments.prepare import beam

  values = dict(
    kind=kind, path=str(path), tokenizer="bytes", validation_percent=20.0,
    sequence_length=test_preparation.LENGTH, shard_bytes=1000,
    alignment=test_preparation.ALIGNMENT,
  )  # fmt: skip
  settings = partition.Settings(**values | changes)
  return beam.make(settings, str(out), options)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
  """A folder a kind."""
  folder = tmp_path_factory.mktemp("corpora")
  for kind in ("jsonl", "text", "parquet"):
    (folder / kind / "sub").mkdir(parents=True)
  texts = test_preparation.texts
  test_documents.write_jsonl(folder / "jsonl" / "a.jsonl", texts(60, 0))
  test_documents.write_jsonl(folder / "jsonl" / "sub/b.jsonl.gz", texts(40, 1))
  test_documents.write_parquet(folder / "parquet" / "a.parquet", texts(60, 0))
  for i in range(3):
    text = "\n".join(texts(50, i)) + "日本"
    (folder / "text" / f"sub/{i}.txt").write_text(text)
  return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  """The folder after the addresses fake://..."""
  from apache_beam.io import filesystem, localfilesystem

  root = tmp_path_factory.mktemp("store")

  class Fake(localfilesystem.LocalFileSystem):
    """Files whose names no local function understands."""

    @classmethod
    def scheme(cls):
      return "fake"

    def _here(self, address):
      assert address.startswith("fake://"), address
      return str(root / address.removeprefix("fake://"))

    def join(self, base, *paths):
      return "/".join([base.rstrip("/"), *paths])

    def exists(self, path):
      return os.path.isfile(self._here(path))  # As a store: no folders.

    def metadata(self, path):
      stat = os.stat(self._here(path))
      return filesystem.FileMetadata(path, stat.st_size, stat.st_mtime)

    def has_dirs(self):
      return False

    def _list(self, prefix):
      for path, _, names in os.walk(root, followlinks=True):
        for name in names:
          here = pathlib.Path(path, name).relative_to(root).as_posix()
          if f"fake://{here}".startswith(prefix):
            yield self.metadata(f"fake://{here}")

    def open(self, path, mime_type="", compression_type="auto"):
      return super().open(self._here(path), mime_type, compression_type)

    def create(self, path, mime_type="", compression_type="auto"):
      return super().create(self._here(path), mime_type, compression_type)

    def rename(self, sources, targets):
      here = lambda paths: [self._here(path) for path in paths]
      return super().rename(here(sources), here(targets))

    def delete(self, paths):
      for path in paths:
        os.unlink(self._here(path))

  yield root
  del Fake


@with_beam
@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_shards_notes_and_manifest_are_those_of_the_local_command(
  corpora, tmp_path, kind
):
  manifest, made = test_preparation.prepare(
    tmp_path / "local", corpora / kind, kind, document_bytes=500
  )
  by_beam = make(corpora / kind, tmp_path / "beam", kind, document_bytes=500)
  assert by_beam.manifest == manifest
  assert by_beam.made == by_beam.shards == len(made) > 3
  assert tree(tmp_path / "beam") == tree(tmp_path / "local")


@with_beam
@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_a_store_is_read_and_written_by_its_addresses(
  corpora, tmp_path, store, kind
):
  test_preparation.prepare(tmp_path / "local", corpora / kind, kind)
  (store / f"{kind}-in").symlink_to(corpora / kind)
  out = f"fake://{kind}-out/a"
  first = make(f"fake://{kind}-in", out, kind)
  assert first.made == first.shards
  local = tree(tmp_path / "local")
  assert tree(store / f"{kind}-out" / "a") == local
  assert not list((store / f"{kind}-out").rglob(".*"))  # Nothing is left.
  second = make(f"fake://{kind}-in", out, kind)
  assert second.made == 0 and second.manifest == first.manifest
  with pytest.raises(ValueError, match="holds another preparation"):
    make(f"fake://{kind}-in", out, kind, alignment=1)
  assert tree(store / f"{kind}-out" / "a") == local


@with_beam
def test_a_store_that_holds_something_else_is_refused(corpora, store):
  (store / "other").mkdir()
  (store / "other" / "a.txt").write_text("a")
  with pytest.raises(ValueError, match="is not empty and holds no prepar"):
    make(corpora / "jsonl", "fake://other")
  with pytest.raises(FileNotFoundError, match="nothing at .*fake://nowhere"):
    make("fake://nowhere", "fake://out")


@with_beam
def test_only_what_is_missing_or_damaged_is_made_again(corpora, tmp_path):
  out = tmp_path / "out"
  first = make(corpora / "jsonl", out)
  whole = tree(out)
  (out / "notes" / "00001.json").unlink()
  (out / "notes" / "00002.json").write_text("{")
  shard = out / "train-00003.array_record"
  shard.write_bytes(shard.read_bytes()[:-1])
  (out / "manifest.json").unlink()
  again = make(corpora / "jsonl", out)
  assert again.made == 3 and again.shards == first.shards
  assert tree(out) == whole


@with_beam
def test_a_tokenizer_goes_to_the_workers(corpora, tmp_path):
  model = tmp_path / "words.model"
  texts = test_preparation.texts(400)
  tokenizer_training.train(iter(texts), len("".join(texts)), model, 300)
  test_preparation.prepare(
    tmp_path / "local", corpora / "jsonl", tokenizer=str(model)
  )
  make(corpora / "jsonl", tmp_path / "beam", tokenizer=str(model))
  assert tree(tmp_path / "beam") == tree(tmp_path / "local")


@with_beam
def test_a_mistake_in_the_corpus_is_one_sentence_and_goes_when_mended(
  corpora, tmp_path
):
  lines = [json.dumps({"text": t}) for t in test_preparation.texts(60)]
  bad = tmp_path / "in.jsonl"
  bad.write_text("\n".join([*lines[:40], "{no", *lines[40:]]) + "\n")
  out = tmp_path / "out"
  with pytest.raises(ValueError, match="line 41: not JSON"):
    make(bad, out)
  assert not (out / "manifest.json").exists()
  # The same size: the corpus is the one that --out was claimed for.
  bad.write_text(bad.read_text().replace("{no", "   "))
  assert make(bad, out).made > 0
  assert not list(out.glob("*.mistake"))


@with_beam
def test_a_runner_that_gives_up_is_one_sentence(corpora, tmp_path, monkeypatch):
  from experiments.prepare import beam

  def no_disk(job, advance):
    raise OSError("the disk is gone")

  monkeypatch.setattr(beam.preparation, "run_job", no_disk)
  with pytest.raises(OSError, match="the Beam job failed: .*disk is gone"):
    make(corpora / "jsonl", tmp_path / "out")
  monkeypatch.undo()
  assert make(corpora / "jsonl", tmp_path / "out").made > 3


@with_beam
def test_the_command_by_many_processes(corpora, tmp_path):
  out = tmp_path / "out"
  args = (
    "--source=jsonl", f"--path={corpora / 'jsonl'}", f"--out={out}",
    "--sequence_length=32", "--alignment=4", "--validation_percent=20",
  )  # fmt: skip
  options = "--direct_running_mode=multi_processing --direct_num_workers=2"
  done = test_commands.run("prepare", *args, f"--beam={options}")
  assert done.returncode == 0, done.stderr
  manifest, _ = test_preparation.prepare(
    tmp_path / "local", corpora / "jsonl", shard_bytes=64 * 2**20
  )
  assert prepared.read_manifest(str(out)) == manifest
  assert "with Beam" in done.stdout and "next: python" in done.stdout


@with_beam
@pytest.mark.parametrize("options,sentence", [
  ("DirectRunner", "begins with no option of Beam"),
  ("--runner='x", "cannot be read: No closing quotation"),
  ("--runner=DataflowRunner", "workers of DataflowRunner see none of it"),
])  # fmt: skip
def test_options_that_cannot_work_are_refused(
  corpora, tmp_path, options, sentence
):
  with pytest.raises(ValueError, match=sentence):
    make(corpora / "jsonl", tmp_path / "out", options=options)
  assert not (tmp_path / "out").exists()


def refused(*args):
  """What the command says where Beam is not installed."""
  code = (
    "import runpy, sys; sys.modules['apache_beam'] = None\n"
    f"sys.argv = ['prepare', *{args!r}]\n"
    "runpy.run_module('experiments.prepare', run_name='__main__')"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=test_commands.ROOT, capture_output=True,
    text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert done.returncode == 1 and "Traceback" not in done.stderr
  return done.stderr


@pytest.mark.parametrize("args,sentence", [
  (("--path=x", "--beam="), "--beam needs Apache Beam: run `pip install -e .["),
  (("--path=x", "--beam=", "--workers=2"), "--beam brings its own"),
  (("--path=gs://b/x",), "--path=gs://b/x is in a store, which only --beam"),
])  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path, args, sentence):
  said = refused(*args, f"--out={tmp_path / 'out'}", "--sequence_length=8")
  assert sentence in said
