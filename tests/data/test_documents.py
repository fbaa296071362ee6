"""Files of documents: what is read, from anywhere, and what is refused."""

import gzip
import json
import os
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from nl_jax.data import bad_documents, documents, examples, packed, sources
from nl_jax.data import parquet as parquet_lib

TEXTS = ["one\nline", "zwei", "", "日本", "four " * 9] * 4


def write_packed(path, content):
  kind = packed.suffix(path.name)
  if kind == ".gz":
    content = gzip.compress(content)
  elif kind == ".zst":
    # Two frames, as tools that work in parallel write them.
    half = len(content) // 2
    pack = lambda part: pa.compress(part, "zstd", asbytes=True)
    content = pack(content[:half]) + pack(content[half:])
  path.write_bytes(content)
  return path


def write_jsonl(path, texts=TEXTS, key="text"):
  lines = [json.dumps({"id": i, key: t}) for i, t in enumerate(texts)]
  return write_packed(path, ("\n".join(lines) + "\n").encode())


def write_parquet(path, texts=TEXTS, key="text", group=3):
  table = pa.table({"id": list(range(len(texts))), key: texts})
  parquet.write_table(table, path, row_group_size=group)
  return path


def texts_of(path, kind, *place, key="text"):
  files = documents.find(str(path), kind)
  read = documents.read(files, files.paths[0], key, *place)
  return [document.text for document in read]


@pytest.mark.parametrize("name", [
  "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL.GZ", "a.json", "a.Json.Zst",
  "c4-train.00000-of-01024.json.gz", "a.parquet",
])  # fmt: skip
def test_every_document_in_order(tmp_path, name):
  kind = "parquet" if name.endswith("parquet") else "jsonl"
  write = write_parquet if kind == "parquet" else write_jsonl
  assert texts_of(write(tmp_path / name), kind) == TEXTS


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "A.JSON.ZST"])
def test_a_json_file_may_be_one_array(tmp_path, name):
  entries = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
  content = " \n" + json.dumps(entries, indent=1)
  path = write_packed(tmp_path / name, content.encode())
  assert texts_of(path, "jsonl") == TEXTS
  entries[3]["text"] = 4
  write_packed(path, json.dumps(entries).encode())
  with pytest.raises(ValueError, match="entry 3: 'text' is int"):
    texts_of(path, "jsonl")
  write_packed(path, b"[1, 2")
  with pytest.raises(ValueError, match=f"{name}: not JSON"):
    texts_of(path, "jsonl")


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.gz", "a.txt.ZST"])
def test_text_may_be_packed(tmp_path, name):
  body = "".join(f"line {i} ünïcode\n" for i in range(100))
  write_packed(tmp_path / name, body.encode())
  assert texts_of(tmp_path / name, "text") == [body]
  source = sources.load("text", str(tmp_path))
  assert source.train[0] + source.validation[0] == body


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text", "array_record"])
def test_bad_documents_are_left_out_with_their_places(tmp_path, kind):
  """The same text is read as if they were not there."""
  texts = [f"document {i}" for i in range(40)]
  values = [*texts, None, "half \ud83d", None, None]
  path = tmp_path / f"a.{kind}"
  if kind == "jsonl":
    write_jsonl(path, values)
  elif kind == "parquet":
    write_parquet(path, [*texts, *[None] * 4])
  elif kind == "array_record":
    write_records(path, [*(t.encode() for t in texts), *[b"\xff"] * 4])
  else:
    for i in range(40):
      (tmp_path / f"{i}.txt").write_text(texts[i])
    for i in range(40, 44):
      (tmp_path / f"{i}.txt").write_bytes(b"\xff")
  with pytest.raises(ValueError):
    sources.load(kind, str(tmp_path))
  source = sources.load(kind, str(tmp_path), bad_documents="skip")
  assert sorted(source.train + source.validation) == sorted(texts)
  assert source.bad == 4 and len(source.bad_places) == 3
  assert all("4" in place for place in source.bad_places)
  assert f"left out 4 bad documents: {source.bad_places[0]};" in (
    source.describe()
  )
  with pytest.raises(ValueError, match="bad_documents must be one of ref"):
    sources.load(kind, str(tmp_path), bad_documents="drop")


SEPARATED = ["one\n\ntwo", "  three", "", "ünïcode\r\nfour", "five"] * 9


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst"])
@pytest.mark.parametrize("mark", ["<|endoftext|>\n", "\n<|endoftext|>\n\n"])
def test_a_separator_parts_a_text(tmp_path, name, mark):
  content = mark.join(SEPARATED).encode()
  path = write_packed(tmp_path / name, content)
  source = sources.load("text", str(path), separator="<|endoftext|>")
  kept = [text for text in SEPARATED if text]
  assert sorted(source.train + source.validation) == sorted(kept)
  assert len(source.validation) > 1
  write_packed(path, content.replace("ü".encode(), b"\xff", 1))
  place = content.index("ü".encode())
  with pytest.raises(ValueError, match=f"0xff at offset {place};"):
    sources.load("text", str(path), separator="<|endoftext|>")
  skipped = sources.load(
    "text", str(path), separator="<|endoftext|>", bad_documents="skip"
  )
  assert skipped.bad == 1
  assert len(skipped.train + skipped.validation) == len(kept) - 1
  with pytest.raises(ValueError, match="=.x. separates .*=.jsonl."):
    sources.load("jsonl", str(path), separator="x")


@pytest.mark.parametrize("block", [3, 7, 64])
def test_a_separator_is_found_wherever_a_block_ends(
  tmp_path, monkeypatch, block
):
  monkeypatch.setattr(documents, "_BLOCK", block)
  path = tmp_path / "a.txt"
  content = b"aaaa<s>bb<s>" + b"c" * 100 + b"<s"
  path.write_bytes(content)
  for goal in range(len(content) + 1):
    ends = [end for end in (7, 12) if end >= goal]
    wanted = ends[0] if ends else None
    assert documents.behind(path, goal, "<s>") == wanted, goal


def test_all_bad_is_said(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", key="body")
  words = "all 20 documents .* are bad, the first: .*line 1: no field 'text'"
  with pytest.raises(ValueError, match=words):
    sources.load("jsonl", str(path), bad_documents="skip")


def test_jsonl_from_any_line_on(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl")
  edges = [0]
  for line in path.read_bytes().splitlines(keepends=True):
    edges.append(edges[-1] + len(line))
  for cut in edges:
    both = texts_of(path, "jsonl", 0, cut) + texts_of(path, "jsonl", cut)
    assert both == TEXTS
  whole = documents.read(documents.find(str(path), "jsonl"), path, "text")
  assert [d.name for d in whole] == [f"a.jsonl:{e}" for e in edges[:-1]]


def test_parquet_from_any_group_on(tmp_path):
  path = write_parquet(tmp_path / "a.parquet")
  files = documents.find(str(path), "parquet")
  groups = parquet_lib.row_groups(path, "text")
  assert sum(rows for rows, _ in groups) == len(TEXTS)
  read = [
    document
    for i in range(len(groups))
    for document in documents.read(files, path, "text", i, i + 1)
  ]
  assert [d.text for d in read] == TEXTS
  assert [d.name for d in read] == [f"a.parquet:{i}" for i in range(20)]


def test_a_folder_is_searched_and_sorted(tmp_path):
  (tmp_path / "b").mkdir()
  for name in ("b/z.jsonl", "a.jsonl", "c.jsonl.gz"):
    write_jsonl(tmp_path / name, ["x"])
  (tmp_path / "notes.md").write_text("no")
  found = documents.find(str(tmp_path), "jsonl")
  names = [found.name(path) for path in found.paths]
  assert names == ["a.jsonl", "b/z.jsonl", "c.jsonl.gz"]


def test_links_are_followed(tmp_path):
  """To folders too, and a ring of them is walked once."""
  (tmp_path / "far" / "b").mkdir(parents=True)
  (tmp_path / "data").mkdir()
  for name in ("data/a.jsonl", "far/b/z.jsonl", "far/y.jsonl"):
    write_jsonl(tmp_path / name, [name])
  (tmp_path / "data" / "link").symlink_to("../far", True)
  (tmp_path / "far" / "ring").symlink_to("../far/b", True)
  (tmp_path / "far" / "b" / "up").symlink_to("..", True)
  (tmp_path / "data" / "self").symlink_to(".", True)
  found = documents.find(str(tmp_path / "data"), "jsonl")
  assert [found.name(path) for path in found.paths] == [
    "a.jsonl", "link/b/z.jsonl", "link/ring/z.jsonl", "link/y.jsonl",
  ]  # fmt: skip
  (tmp_path / "data" / "notes.md").symlink_to("nowhere")
  documents.find(str(tmp_path / "data"), "jsonl")
  (tmp_path / "data" / "c.jsonl").symlink_to("nowhere")
  with pytest.raises(ValueError, match="c.jsonl is a symbolic link that leads"):
    documents.find(str(tmp_path / "data"), "jsonl")


@pytest.mark.parametrize("kind", [*documents.SUFFIXES, "array_record"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, kind, alone):
  path = tmp_path / documents.SUFFIXES.get(kind, (".array_record",))[0]
  os.mkfifo(path)
  with pytest.raises(ValueError, match="not a plain file .a pipe"):
    sources.load(kind, str(path if alone else tmp_path))


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
  (tmp_path / "a").mkdir()
  write_jsonl(tmp_path / "b.jsonl")
  was = pathlib.Path.iterdir

  def closed(self):
    if self.name == "a":
      raise PermissionError(13, "Permission denied", str(self))
    return was(self)

  monkeypatch.setattr(pathlib.Path, "iterdir", closed)
  with pytest.raises(PermissionError, match="/a"):
    documents.find(str(tmp_path), "jsonl")


@pytest.mark.parametrize("line,words", [
  (b'{"text": "a"\n', "line 3: not JSON"),
  (b'["a"]\n', "line 3: no field 'text'"),
  (b'{"body": "a", "id": 1}\n', "it has: body, id.*data.text_key"),
  (b'{"text": 5}\n', "'text' is int, expected text"),
  (b'{"text": "\xff"}\n', "not UTF-8: byte 0xff"),
  (b'{"text": "a\\ud83d"}\n', "line 3: 'text' has half a character"),
  (b'{"text": null}\n', "line 3: 'text' is null, expected text"),
  (b'{"text": "a", "id": ' + b"[" * 200_000, "line 3: JSON that is nested too"),
  (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "line 3: not JSON .*4300 dig"),
])  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, words):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"text": "x"}\n\n' + line)
  with pytest.raises(ValueError, match=words):
    texts_of(path, "jsonl")


@pytest.mark.parametrize("name,kind", [
  ("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstandard"), ("a.txt.zst", "zsta"),
])  # fmt: skip
@pytest.mark.parametrize("damage", [
  lambda content: content[:-20],
  lambda content: content[:2] + b"xxxx" + content[6:],
  lambda content: b"not packed at all",
])  # fmt: skip
def test_a_damaged_packed_file_is_named(tmp_path, name, kind, damage):
  path = write_jsonl(tmp_path / name, TEXTS * 20)
  path.write_bytes(damage(path.read_bytes()))
  for policy in bad_documents.POLICIES:  # It is not a document that is bad.
    with pytest.raises(ValueError, match=f"{name} is not a whole {kind}"):
      sources.load("text" if "txt" in name else "jsonl", str(path),
                   bad_documents=policy)  # fmt: skip


def test_bad_parquet_is_named(tmp_path):
  path = write_parquet(tmp_path / "a.parquet", key="body")
  with pytest.raises(ValueError, match="no column 'text'.*id, body"):
    texts_of(path, "parquet")
  path.write_bytes(b"PAR1 no")
  with pytest.raises(ValueError, match="is not a parquet file"):
    texts_of(path, "parquet")
  whole = bytearray(write_parquet(path, TEXTS * 99, group=500).read_bytes())
  text = whole.index(b"four four")  # In the dictionary of the column.
  for place in (len(whole) - 8, text):
    path.write_bytes(whole[:place] + b"\xff" * 8 + whole[place + 8 :])
    with pytest.raises(ValueError, match="a.parquet.*get the file again"):
      texts_of(path, "parquet")
  numbers = write_parquet(tmp_path / "n.parquet")
  with pytest.raises(ValueError, match="row 0: 'id' is int"):
    texts_of(numbers, "parquet", key="id")


@pytest.mark.parametrize("kind", list(documents.SUFFIXES))
def test_nothing_there(tmp_path, kind):
  with pytest.raises(ValueError, match="needs data.path"):
    documents.find("", kind)
  with pytest.raises(FileNotFoundError, match="nothing at data.path"):
    documents.find(str(tmp_path / "no"), kind)
  with pytest.raises(ValueError, match=f"no {documents.SUFFIXES[kind][0]}"):
    documents.find(str(tmp_path), kind)


@pytest.mark.parametrize("kind,write", [
  ("jsonl", write_jsonl), ("parquet", write_parquet)
])  # fmt: skip
def test_a_source_of_many_documents_is_split_by_their_names(
  tmp_path, kind, write
):
  texts = [f"document {i}" for i in range(300)]
  write(tmp_path / f"a.{kind}", texts)
  source = sources.load(kind, str(tmp_path))
  assert sorted(source.train + source.validation) == sorted(texts)
  assert 10 <= len(source.validation) <= 60
  again = sources.load(kind, str(tmp_path / f"a.{kind}"))
  assert again.fingerprint == source.fingerprint


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_of_a_page_is_named(tmp_path, bit):
  """Where pages have sums: others let through what decodes."""
  path = tmp_path / "a.parquet"
  table = pa.table({"text": TEXTS * 5})
  parquet.write_table(
    table, path, row_group_size=30, compression="none", use_dictionary=False,
    write_page_checksum=True,
  )  # fmt: skip
  content = bytearray(path.read_bytes())
  at = content.rindex(b"zwei")
  content[at] ^= 1 << bit
  path.write_bytes(content)
  with pytest.raises(ValueError, match="a.parquet, row group 3 is damaged"):
    texts_of(path, "parquet")


def varint(value):
  low, rest = value & 0x7F, value >> 7
  return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number, content):
  return bytes([number << 3 | 2]) + varint(len(content)) + content


def example(**features):
  """A tf.train.Example: texts, or one number."""
  entries = [
    field(1, field(1, key.encode()) + field(2, (
      field(3, field(1, varint(value))) if isinstance(value, int)
      else field(1, b"".join(field(1, text.encode()) for text in value))
    )))
    for key, value in features.items()
  ]  # fmt: skip
  return field(1, b"".join(entries))


def write_records(path, records):
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  return path


def test_records_that_are_examples(tmp_path):
  texts = [f"record {i} ü" * (1 + 40 * i) for i in range(40)]
  write = lambda key: write_records(
    tmp_path / "a.array_record",
    [example(id=i, **{key: [text]}) for i, text in enumerate(texts)],
  )
  write("text")
  source = sources.load("array_record", str(tmp_path))
  assert sorted(source.train + source.validation) == sorted(texts)
  write("body")
  source = sources.load("array_record", str(tmp_path), text_key="body")
  assert sorted(source.train + source.validation) == sorted(texts)
  for key, words in (
    ("text", r"record 0 is a tf.train.Example without.*it has: id, body"),
    ("id", r"record 0: the feature 'id' holds 0 texts \(integers\)"),
  ):
    with pytest.raises(ValueError, match=f"a.array_record, {words}"):
      sources.load("array_record", str(tmp_path), text_key=key)
  write_records(tmp_path / "a.array_record", [b"fine"] * 9 + [b"a\xff"])
  with pytest.raises(ValueError, match="record 9 is not UTF-8.*0xff at offset"):
    sources.load("array_record", str(tmp_path))


@pytest.mark.parametrize("record", [
  b"text", b"\n\x04text", b"\n", b"", b"\n\x06\n\x04text",
  example(a=["b"])[:-1], example(a=["b"]) + b" ",
  b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
])  # fmt: skip
def test_text_is_no_example(record):
  assert examples.features(record) is None
  assert examples.features(example(a=["b"]))["a"].values == (b"b",)


def test_array_records_of_documents(tmp_path):
  texts = [f"record {i} ü" for i in range(40)]
  path = write_records(
    tmp_path / "a.array_record", [text.encode() for text in texts]
  )
  source = sources.load("array_record", str(tmp_path))
  assert sorted(source.train + source.validation) == sorted(texts)
  path.write_bytes(b"none")
  with pytest.raises(ValueError, match="not an ArrayRecord file"):
    sources.load("array_record", str(path))
  with pytest.raises(FileNotFoundError, match="nothing at"):
    sources.load("array_record", "")


def test_hugging_face_folders(tmp_path):
  datasets = pytest.importorskip("datasets")
  rng = np.random.default_rng(0)
  texts = ["".join(map(chr, rng.integers(97, 123, 9))) for _ in range(50)]
  table = datasets.Dataset.from_dict({"text": texts})
  table.save_to_disk(tmp_path / "one")
  source = sources.load("hugging_face", str(tmp_path / "one"))
  assert sorted(source.train + source.validation) == sorted(texts)
  split = datasets.DatasetDict(
    train=table.select(range(40)), test=table.select(range(40, 50))
  )
  split.save_to_disk(tmp_path / "two")
  source = sources.load("hugging_face", str(tmp_path / "two"))
  assert (source.train, source.validation) == (
    tuple(texts[:40]), tuple(texts[40:])
  )  # fmt: skip
  with pytest.raises(ValueError, match="no column 'body'"):
    sources.load("hugging_face", str(tmp_path / "one"), text_key="body")
  numbers = datasets.Dataset.from_dict({"text": list(range(50))})
  numbers.save_to_disk(tmp_path / "numbers")
  with pytest.raises(ValueError, match="'text' is int, expected text"):
    sources.load("hugging_face", str(tmp_path / "numbers"))
  bare = datasets.Dataset.from_dict({"text": ["", ""]})
  datasets.DatasetDict(train=bare, test=table).save_to_disk(tmp_path / "bare")
  with pytest.raises(ValueError, match="a split without text"):
    sources.load("hugging_face", str(tmp_path / "bare"))
  with pytest.raises(ValueError, match="not a folder of save_to_disk"):
    sources.load("hugging_face", str(tmp_path))
  for path in sorted(p for p in (tmp_path / "one").iterdir()):
    content = path.read_bytes()
    for damage in (b"", b"null", b"[]", b"\xff", b"[" * 10**5, content[:-90]):
      path.write_bytes(damage)
      with pytest.raises(ValueError, match="data.path=.*save it again"):
        sources.load("hugging_face", str(tmp_path / "one"))
    path.write_bytes(content)
  arrow = tmp_path / "one" / "data-00000-of-00001.arrow"
  whole = arrow.read_bytes()
  at = whole.rindex(texts[49].encode())
  arrow.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
  with pytest.raises(ValueError, match="is damaged in column 'text'.*UTF"):
    sources.load("hugging_face", str(tmp_path / "one"))
