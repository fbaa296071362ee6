"""Prepared corpora: the same rows as in memory, whoever makes them."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from nl_jax import data
from nl_jax.data import packing, partition, preparation, prepared, tokenizers
from tests.data import test_documents

LENGTH, ALIGNMENT = 32, 4
ROOT = pathlib.Path(__file__).parents[2]


def texts(count=60, seed=0):
  rng = np.random.default_rng(seed)
  words = lambda: "".join(map(chr, rng.integers(97, 123, 5)))
  return [
    " ".join(words() for _ in range(rng.integers(1, 30))) for _ in range(count)
  ]


def prepare(out, path, kind="jsonl", **changes):
  values = dict(
    kind=kind, path=str(path), tokenizer="bytes", sequence_length=LENGTH,
    alignment=ALIGNMENT, validation_percent=20.0, shard_bytes=1000,
  )  # fmt: skip
  settings = partition.Settings(**values | changes)
  tokenizer = preparation.check(settings)
  about = preparation.claim(settings, tokenizer)
  shards = partition.plan(settings)
  preparation.open_folder(out, about)
  made = [
    preparation.run_job(
      preparation.Job(i, pieces, settings, str(out)), lambda size: None
    )
    for i, pieces in enumerate(shards)
  ]
  return (
    preparation.finish(out, settings, about, tokenizer, len(shards)),
    made,
  )


def load(path, **changes):
  values = dict(
    source="prepared", path=str(path), sequence_length=LENGTH, batch_size=4,
    alignment=ALIGNMENT, seed=3,
  )  # fmt: skip
  return data.load(**values | changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  test_documents.write_jsonl(folder / "a.jsonl", texts(60, 0))
  test_documents.write_jsonl(folder / "b.jsonl", texts(40, 1))
  return folder


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
  out = tmp_path_factory.mktemp("made") / "out"
  manifest, _ = prepare(out, corpus)
  return out, manifest


def all_rows(table):
  return packing.take(table, np.arange(packing.count(table)))


def test_every_document_is_there_once(corpus, made):
  out, manifest = made
  assert len(manifest["shards"]) > 4
  whole = load(out)
  read = []
  for split in ("train", "validation"):
    rows = all_rows(whole.rows[split])
    real = rows["segment_ids"] > 0
    targets = rows["targets"][real]
    read += tokenizers.Bytes().to_bytes(targets[targets != 1])
    assert whole.counts[split].tokens == real.sum()
    assert whole.counts[split].rows == len(real)
  # Inputs leave the end id out, targets the first byte of each document.
  every = [t for seed, n in ((0, 60), (1, 40)) for t in texts(n, seed)]
  expected = "".join(t[1:] for t in every).encode()
  assert sorted(read) == sorted(expected)
  sizes = [whole.counts[s].bytes for s in ("train", "validation")]
  assert sum(sizes) == len("".join(every))
  assert sizes[1] > 0


@pytest.mark.parametrize("files", [1, 3, 40])
def test_rows_are_those_of_the_packer_in_memory(tmp_path, files):
  """Text in one shard: split, rows, counts and order of the source itself."""
  folder = tmp_path / "corpus"
  folder.mkdir()
  (folder / "empty.txt").write_text("")
  for i in range(files):
    (folder / f"{i}.txt").write_text("\n".join(texts(200 // files, i)))
  prepare(
    tmp_path / "out", folder, "text", shard_bytes=2**20, validation_percent=10.0
  )
  one, two = load(tmp_path / "out"), load(folder, source="text")
  for split in ("train", "validation"):
    for key, x in all_rows(two.rows[split]).items():
      np.testing.assert_array_equal(all_rows(one.rows[split])[key], x)
  for _ in range(7):
    a, b = next(one.train), next(two.train)
    for key in b:
      np.testing.assert_array_equal(a[key], b[key])
  assert one.train.get_state() == two.train.get_state() == {"next_row": 28}
  assert one.counts == two.counts


@pytest.mark.parametrize("ending", ["txt.gz", "txt.zst", "json.gz", "json"])
@pytest.mark.parametrize("files", [1, 12])
def test_packed_files_are_prepared_as_they_are_read(tmp_path, ending, files):
  folder = tmp_path / "corpus"
  folder.mkdir()
  for i in range(files):
    lines = texts(120 // files, i)
    if "json" in ending:
      content = json.dumps([{"text": text} for text in lines])
    else:
      content = "\n".join(lines)
    test_documents.write_packed(folder / f"{i}.{ending}", content.encode())
  kind = "jsonl" if "json" in ending else "text"
  prepare(tmp_path / "out", folder, kind, validation_percent=10.0)
  one, two = load(tmp_path / "out"), load(folder, source=kind)
  read = []
  for loaded in (one, two):
    rows = [all_rows(loaded.rows[split]) for split in ("train", "validation")]
    targets = [x["targets"][x["weights"] > 0] for x in rows]
    assert all(map(len, targets))
    # Of few documents of jsonl one more is held out in memory.
    targets = targets if kind == "text" else [np.concatenate(targets)]
    read.append([sorted(x) for x in targets])
  assert read[0] == read[1]


@pytest.mark.parametrize("shard_bytes", [50, 400, 10**6])
@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
def test_a_separated_text_is_prepared_as_it_is_read(
  tmp_path, shard_bytes, ending
):
  every = [text for text in texts(80) if text]
  path = tmp_path / f"a.{ending}"
  test_documents.write_packed(path, "\n<|eot|>\n".join(every).encode())
  manifest, _ = prepare(
    tmp_path / "out", path, "text", separator="<|eot|>", shard_bytes=shard_bytes
  )
  counts = manifest["counts"]
  assert sum(x["documents"] for x in counts.values()) == len(every)
  assert sum(x["bytes"] for x in counts.values()) == len("".join(every))
  assert counts["validation"]["documents"] > 4
  assert ending != "txt" or (len(manifest["documents_sha256"]) > 1) == (
    shard_bytes < 1000
  )


def test_bad_documents_are_left_out_and_counted(tmp_path):
  every = texts(60)
  for i, text in ((3, None), (20, 5), (40, None), (55, None)):
    every[i] = text
  (tmp_path / "corpus").mkdir()
  source = test_documents.write_jsonl(tmp_path / "corpus" / "a.jsonl", every)
  with pytest.raises(ValueError, match="line 4: 'text' is null"):
    prepare(tmp_path / "refused", source)
  manifest, _ = prepare(tmp_path / "out", source, bad_documents="skip")
  assert manifest["bad_documents"]["count"] == 4
  places = manifest["bad_documents"]["places"]
  assert [place.split(":")[0] for place in places] == [
    "a.jsonl, line 4", "a.jsonl, line 21", "a.jsonl, line 41",
  ]  # fmt: skip
  again, made = prepare(tmp_path / "out", source, bad_documents="skip")
  assert not any(made) and again == manifest
  assert sum(x["documents"] for x in manifest["counts"].values()) == 56
  assert load(tmp_path / "out").counts["train"].rows > 0
  with pytest.raises(ValueError, match="bad_documents: .skip. -> null"):
    prepare(tmp_path / "out", source)


def test_drawing_goes_on_from_one_integer_on_any_process_count(made):
  out, _ = made
  whole = load(out)
  batches = [next(whole.train) for _ in range(20)]
  half = [load(out, process_index=i, process_count=2) for i in (0, 1)]
  for part in half:
    part.train.set_state({"next_row": 44})
  for batch in batches[11:]:
    parts = [next(part.train) for part in half]
    for key, x in batch.items():
      joined = np.concatenate([part[key] for part in parts])
      np.testing.assert_array_equal(joined, x)


def test_stopped_and_damaged_shards_are_made_again_and_no_others(
  corpus, made, tmp_path
):
  _, manifest = made
  out = tmp_path / "out"
  again, first = prepare(out, corpus)
  assert all(first)
  assert prepared.manifest_hash(again) == prepared.manifest_hash(manifest)
  _, second = prepare(out, corpus)
  assert not any(second)
  shard = out / "train-00003.array_record"
  content = bytearray(shard.read_bytes())
  content[100:400] = bytes(255 ^ x for x in content[100:400])
  shard.write_bytes(bytes(content))
  (out / "notes" / "00001.json").write_text("{")
  mended, third = prepare(out, corpus)
  assert sum(third) == 2 and third[1] and third[3]
  assert prepared.manifest_hash(mended) == prepared.manifest_hash(manifest)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_other_input_is_read_again_however_old_it_is(tmp_path, kind):
  """As tar, rsync -a and cp -p bring it: of the same size, and older."""
  write = {"jsonl": test_documents.write_jsonl, "text": write_text}
  write = write.get(kind, test_documents.write_parquet)
  source, every = tmp_path / f"a.{kind}", texts(60)
  write(source, every)
  before, _ = prepare(tmp_path / "out", source, kind)
  size = source.stat().st_size
  write(source, [text.replace("a", "b") for text in every])
  os.utime(source, (1e9, 1e9))
  assert source.stat().st_size == size
  after, made = prepare(tmp_path / "out", source, kind)
  assert all(made)
  assert before["counts"] == after["counts"] and before != after
  os.utime(source)
  again, made = prepare(tmp_path / "out", source, kind)
  assert not any(made) and again == after


def write_text(path, every):
  path.write_text("\n".join(every) + "\n")


@pytest.mark.parametrize("damage", [
  b"[]", b"null", b"\xff", b"{}", b'{"shards": [3], "counts": 1}',
])  # fmt: skip
def test_a_damaged_note_is_none(corpus, made, tmp_path, damage):
  out = tmp_path / "out"
  prepare(out, corpus)
  preparation.note_path(out, 2).write_bytes(damage)
  manifest, again = prepare(out, corpus)
  assert sum(again) == 1 and again[2] and manifest == made[1]


@pytest.mark.parametrize("change,words", [
  ({"alignment": 8}, "alignment: 4 -> 8"),
  ({"sequence_length": 64}, "sequence_length: 32 -> 64"),
  ({"validation_percent": 30.0}, "validation_percent"),
])  # fmt: skip
def test_another_preparation_is_refused(corpus, made, change, words):
  with pytest.raises(ValueError, match=f"holds another preparation.*{words}"):
    prepare(made[0], corpus, **change)


def test_a_strangers_folder_is_refused(corpus, tmp_path):
  (tmp_path / "precious").write_text("x")
  with pytest.raises(ValueError, match="not empty"):
    prepare(tmp_path, corpus)
  assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("change,words", [
  ({"sequence_length": 64}, "prepared for data.sequence_length=32, got 64"),
  ({"alignment": 8}, "prepared for alignment 4.*--alignment=8"),
  ({"path": "nowhere"}, "no folder data.path='nowhere'"),
  ({"path": "."}, "has no manifest.json"),
])  # fmt: skip
def test_runs_that_do_not_fit(made, change, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises((ValueError, FileNotFoundError), match=words):
    load(**{"path": made[0]} | change)


def test_shards_that_are_gone_or_cut_are_named(corpus, tmp_path):
  out = tmp_path / "out"
  manifest, _ = prepare(out, corpus)
  shard = out / manifest["shards"][0]["file"]
  content = shard.read_bytes()
  shard.write_bytes(content[:-100])
  with pytest.raises(ValueError, match=f"{shard.name} is .* bytes, expected"):
    load(out)
  shard.unlink()
  with pytest.raises(ValueError, match=f"{shard.name} is missing"):
    load(out)
  text = (out / "manifest.json").read_text()
  assert f'"alignment": {ALIGNMENT},' in text
  wrong = text.replace(f'"alignment": {ALIGNMENT},', '"alignment": 1,')
  (out / "manifest.json").write_text(wrong)
  with pytest.raises(ValueError, match="json is not what was written; run"):
    load(out)
  for damage in (b"{", b"\xff", b"[" * 10**5):
    (out / "manifest.json").write_bytes(damage)
    with pytest.raises(ValueError, match="not JSON"):
      load(out)
  for key, value, place in (
    ("sequence_length", -1, "sequence_length"), ("tokenizer", [], "tokenizer"),
    ("counts", {"train": {}}, "counts.train.documents"),
    ("shards", [{"file": None}], r"shards\[0\].file"),
  ):  # fmt: skip
    damaged = json.dumps(manifest | {key: value})
    (out / "manifest.json").write_text(damaged)
    with pytest.raises(
      ValueError, match=f"manifest.json is damaged at {place}"
    ):
      load(out)
  (out / "manifest.json").write_text("null")
  with pytest.raises(ValueError, match="is not a manifest"):
    load(out)


def test_a_damaged_row_is_told_where_it_is_read(corpus, tmp_path):
  out = tmp_path / "out"
  manifest, _ = prepare(out, corpus)
  shard = [s for s in manifest["shards"] if s["split"] == "train"][3]
  path = out / shard["file"]
  content = bytearray(path.read_bytes())
  content[300:900] = bytes(255 ^ x for x in content[300:900])
  path.write_bytes(bytes(content))
  loaded = load(out)
  with pytest.raises(ValueError, match=f"{shard['file']} is damaged"):
    for _ in range(loaded.counts["train"].rows):
      next(loaded.train)
  path.write_bytes(b"x" * len(content))
  with pytest.raises(ValueError, match=f"{shard['file']} is damaged"):
    load(out)


def test_prepared_rows_are_no_text(made):
  out, _ = made
  with pytest.raises(ValueError, match="set data.source=prepared and"):
    load(out, source="array_record")


def test_a_large_validation_is_read_batch_by_batch(made, monkeypatch):
  loaded = load(made[0])
  taken = []
  take = prepared.Table.take
  monkeypatch.setattr(
    prepared.Table, "take", lambda *args: taken.append(1) or take(*args)
  )
  batches = loaded.validation()
  assert len(batches) > 3 and not taken
  weight = sum(batch["weights"].sum() for batch in batches)
  assert weight == loaded.counts["validation"].tokens
  assert len(taken) == len(batches)


def test_a_full_disk_is_told_and_gone_on_from(
  corpus, made, tmp_path, monkeypatch
):
  out = tmp_path / "out"
  fsync, calls = os.fsync, []

  def full(descriptor):
    calls.append(descriptor)
    if len(calls) > 7:
      raise OSError(errno.ENOSPC, "No space left on device")
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left.*free space and start the"):
    prepare(out, corpus)
  monkeypatch.undo()
  assert not list(out.glob(".*.tmp")) and list(out.glob("*.array_record"))
  manifest, again = prepare(out, corpus)
  assert not all(again) and any(again)
  assert manifest == made[1]


def test_a_full_disk_as_the_writer_of_records_says_it(
  corpus, tmp_path, monkeypatch
):
  records = prepared.Layout.records

  def full(self, rows):
    if len(rows["inputs"]):
      raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device; at 9")
    return records(self, rows)

  monkeypatch.setattr(prepared.Layout, "records", full)
  words = "array_record cannot be written: No space left on device; free space"
  with pytest.raises(OSError, match=words):
    prepare(tmp_path / "out", corpus)
  assert not list((tmp_path / "out").glob("*.array_record"))


@pytest.mark.parametrize("place", [
  "packing.Packer.push", "os.fsync", "pathlib.Path.replace",
  "packing.Packer.flush",
])  # fmt: skip
def test_killed_twice_at_any_place_gives_the_same(
  corpus, made, tmp_path, place
):
  """The n-th call of a function is a SIGKILL, in the middle of a shard."""
  out = tmp_path / "out"
  for call in (4, 9):
    code = (
      "import os, pathlib, signal, sys\n"
      "from nl_jax.data import packing\n"
      "from tests.data import test_preparation\n"
      f"was, left = {place}, [{call}]\n"
      "def killing(*args):\n"
      "  left[0] -= 1\n"
      "  if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
      "  return was(*args)\n"
      f"{place} = killing\n"
      f"test_preparation.prepare(pathlib.Path({str(out)!r}), "
      f"{str(corpus)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
  manifest, again = prepare(out, corpus)
  assert not all(again)
  assert manifest == made[1]
  for shard in manifest["shards"]:
    name = shard["file"]
    assert (out / name).read_bytes() == (made[0] / name).read_bytes()


def test_the_manifest_goes_before_a_shard_is_made_anew(
  corpus, tmp_path, monkeypatch
):
  out = tmp_path / "out"
  manifest, _ = prepare(out, corpus)
  (out / manifest["shards"][2]["file"]).unlink()

  def stopped(*args):
    assert not (out / "manifest.json").exists()
    raise KeyboardInterrupt

  monkeypatch.setattr(preparation, "_write", stopped)
  with pytest.raises(KeyboardInterrupt):
    prepare(out, corpus)
  with pytest.raises(ValueError, match="has no manifest.json"):
    load(out)


def test_one_process_a_folder(made):
  with preparation.lock(made[0]):
    with pytest.raises(ValueError, match="another process is preparing"):
      with preparation.lock(made[0]):
        pass
  with preparation.lock(made[0]):
    pass


def test_the_tokenizer_must_be_the_same(made, tmp_path):
  manifest = dict(made[1])
  manifest["tokenizer"] = {"name": "words.model", "fingerprint": "0"}
  with pytest.raises(ValueError, match="data.tokenizer is not the one"):
    prepared.check(
      manifest, sequence_length=LENGTH, alignment=1,
      tokenizer_fingerprint=tokenizers.Bytes.fingerprint,
    )  # fmt: skip


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
  """What a worker holds: tokens of a flush, less than a row after it."""
  held = []
  push = packing.Packer.push

  def watched(self, documents):
    held.append(sum(map(len, documents)))
    return push(self, documents)

  monkeypatch.setattr(packing.Packer, "push", watched)
  monkeypatch.setattr(preparation, "_FLUSH_TOKENS", 2000)
  test_documents.write_jsonl(tmp_path / "a.jsonl", texts(2000))
  prepare(tmp_path / "out", tmp_path / "a.jsonl", shard_bytes=2**20)
  assert len(held) > 50 and max(held) < 2400


def test_no_path_of_this_machine_is_in_the_manifest(made):
  out, _ = made
  text = json.dumps([
    json.loads(path.read_text()) for path in out.rglob("*.json")
  ])  # fmt: skip
  assert str(pathlib.Path(out).parent) not in text
