"""Sources: what is read, what is held out, what is refused."""

import hashlib
import io
import pathlib
import zipfile

import pytest

from experiments.prepare import embedded
from nl_jax.data import sources


def _write(folder: pathlib.Path, files: dict[str, str]) -> str:
  for name, body in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body.encode("utf-8"))
  return str(folder)


def test_embedded_is_python_source_of_useful_size():
  source = sources.embedded()
  sizes = [sum(map(len, source.documents(s))) for s in sources.SPLITS]
  assert 2e6 < sum(sizes) < 4e6
  assert 0.05 < sizes[1] / sum(sizes) < 0.10
  assert not set(source.train) & set(d for d in source.validation if d)
  assert any("def " in document for document in source.validation)


def test_embedded_is_the_same_under_every_python():
  source = sources.embedded()
  # A literal: all figures of docs/results.md are of this text.
  assert source.fingerprint == (
    "f4e5f01c6325afcbd53cce521686118b7917277147175568e0979e623faca472"
  )
  assert [len(source.documents(split)) for split in sources.SPLITS] == [189, 16]


def test_embedded_packages_are_parts_of_it():
  whole, parts = sources.embedded(), []
  for package in sources.EMBEDDED_PACKAGES:
    own = sources.embedded(packages=(package,))
    parts += own.train + own.validation
  assert sorted(parts) == sorted(whole.train + whole.validation)
  with pytest.raises(ValueError, match="no package 'jason'. Did you mean 'jso"):
    sources.embedded(packages=("json", "jason"))


def test_another_archive_is_refused(tmp_path, monkeypatch):
  folder = tmp_path / "embedded"
  folder.mkdir()
  monkeypatch.setattr(
    sources.importlib.resources, "files", lambda name: tmp_path
  )
  with pytest.raises(ValueError, match="is missing, expected 6e1ec9b3ddf2"):
    sources.embedded()
  (folder / "corpus.zip").write_bytes(b"no archive")
  with pytest.raises(ValueError, match="expected 6e1e.*install nl_jax again"):
    sources.embedded()


def test_the_packed_library_has_no_tests_and_is_sorted(tmp_path):
  root = _write(
    tmp_path,
    {
      "p/z.py": "z",
      "p/a.py": "a",
      "p/test/t.py": "t",
      "p/x/tests/t.py": "t",
      "p/data.txt": "d",
      "q/m.py": "m",
    },
  )
  content = embedded.pack(pathlib.Path(root), ("q", "p"))
  archive = zipfile.ZipFile(io.BytesIO(content))
  assert archive.namelist() == ["p/a.py", "p/z.py", "q/m.py"]
  assert archive.read("q/m.py") == b"m"
  assert content == embedded.pack(pathlib.Path(root), ("p", "q"))


def test_split_is_the_documented_hash_of_the_path():
  paths = [f"folder/file{i}.py" for i in range(2000)]
  held_out = [p for p in paths if sources.in_validation(p, 8)]
  assert 0.06 < len(held_out) / len(paths) < 0.10
  for path in paths[:50]:
    number = int(hashlib.sha256(path.encode()).hexdigest()[:8], 16)
    assert sources.in_validation(path, 8) == (number % 100 < 8)
  # Literals: moving a document between the splits must not go unnoticed.
  assert sources.in_validation("email/parser.py", 8)
  assert not sources.in_validation("asyncio/events.py", 8)


def test_split_of_a_file_does_not_depend_on_other_files(tmp_path):
  files = {f"{i}.txt": f"document {i}" for i in range(60)}
  before = sources.files(_write(tmp_path, files), "text")
  after = sources.files(
    _write(tmp_path, {"new.txt": "new", "z/n.txt": "more"}), "text"
  )
  assert set(before.train) <= set(after.train)
  assert set(before.validation) <= set(after.validation)
  assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize("count", [10, 11, 13])
def test_a_small_folder_has_both_splits(tmp_path, count):
  for trial in range(20):
    files = {f"{trial}_{i}.txt": f"text {i}\n" for i in range(count)}
    source = sources.files(_write(tmp_path / str(trial), files), "text")
    assert source.train and source.validation
    assert len(source.train + source.validation) == count


@pytest.mark.parametrize(
  "body",
  [
    "".join(f"line {i} of the text\n" for i in range(100)),
    "short\n" * 3,
    "one line without any edge " * 20,
    "a\n" + "b" * 500,
    "b" * 500 + "\na",
    "b" * 500 + "\n",
    "ab",
    "\n\n",
    "é" * 50 + "\r\n" + "ü" * 4,
  ],
)
def test_a_single_file_is_cut_once(tmp_path, body):
  source = sources.files(_write(tmp_path, {"t.md": body}) + "/t.md", "text")
  (train,), (validation,) = source.train, source.validation
  assert train + validation == body
  assert train and validation
  if body.count("\n") > 5:
    assert train.endswith("\n")
    assert abs(len(validation) / len(body) - 0.1) < 0.02


def test_a_folder_of_few_files_is_cut_file_by_file(tmp_path):
  files = {f"{i}.txt": f"{i}\n" * 50 for i in range(3)} | {"skip.md": "x"}
  source = sources.files(_write(tmp_path, files), "text")
  assert [a + b for a, b in zip(source.train, source.validation)] == [
    files[f"{i}.txt"] for i in range(3)
  ]


def test_fingerprint_is_of_the_content_not_of_the_place(tmp_path):
  one = _write(tmp_path / "one", {"a.txt": "text\n" * 9, "b/c.txt": "c\n" * 9})
  two = _write(tmp_path / "two", {"a.txt": "text\n" * 9, "b/c.txt": "c\n" * 9})
  assert (
    sources.files(one, "text").fingerprint
    == sources.files(two, "text").fingerprint
  )
  three = _write(tmp_path / "three", {"a.txt": "text\n" * 9 + "c\n" * 9})
  prints = {
    sources.files(p, "text").fingerprint for p in (one, three, one + "/a.txt")
  }
  assert len(prints) == 3


def test_synthetic_is_made_by_its_seed():
  one, two = sources.synthetic(1, 64), sources.synthetic(1, 64)
  assert one == two
  assert one.fingerprint != sources.synthetic(2, 64).fingerprint
  assert (len(one.train), len(one.validation)) == (60, 4)
  assert max(map(len, one.train)) <= sources.SYNTHETIC_LENGTH
  assert len(set(one.train)) == 60
  for line in one.train[1].split("\n")[:-1]:
    first, second = line.split("=")
    assert first == second


def test_describe_names_origin_and_sizes():
  line = sources.synthetic(3, 32).describe()
  assert "seed 3" in line and "train 30 documents" in line
  assert "a" * 30 not in repr(sources.synthetic(3, 32))


@pytest.mark.parametrize(
  "files, path, error, words",
  [
    ({}, "", ValueError, "needs data.path"),
    ({}, "gone", FileNotFoundError, "nothing at data.path='.*gone'"),
    ({"d/a.md": "x"}, "d", ValueError, "no .txt file"),
    ({"e.txt": ""}, "e.txt", ValueError, "is empty"),
    ({"d/e.txt": "", "d/f.txt": ""}, "d", ValueError, "is empty"),
    ({"one.txt": "x"}, "one.txt", ValueError, "too little text"),
  ],
)
def test_unusable_text_is_refused(tmp_path, files, path, error, words):
  _write(tmp_path, files)
  with pytest.raises(error, match=words) as caught:
    sources.files(path and str(tmp_path / path), "text")
  assert "\n" not in str(caught.value)


def test_undecodable_bytes_name_file_and_offset(tmp_path):
  (tmp_path / "good.txt").write_text("fine")
  (tmp_path / "bad.txt").write_bytes(b"12345\xff67")
  with pytest.raises(ValueError, match=r"bad.txt is not UTF-8.*0xff.*offset 5"):
    sources.files(str(tmp_path), "text")


def test_names_and_ignored_paths_are_refused():
  with pytest.raises(ValueError, match="Did you mean 'embedded'"):
    sources.load("embeded")
  with pytest.raises(ValueError, match="data.path='x' is not read"):
    sources.load("embedded", "x")
  with pytest.raises(ValueError, match="no split 'test'"):
    sources.synthetic(0, 8).documents("test")
