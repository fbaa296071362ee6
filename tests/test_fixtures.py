"""What earlier versions wrote still loads and continues: `tests.fixtures`."""

import json
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest

from nl_jax import build, data, formats, stream
from nl_jax.data import preparation as preparation_lib
from nl_jax.data import prepared, tokenizers
from nl_jax.files import sealed, unsealed
from nl_jax.train import checkpoint, files, loop
from tests.fixtures import make, others
from tests.laws.models import MODELS

FOLDER = pathlib.Path(make.__file__).parent
# What Python 3.11 and jax 0.10 wrote, and what 3.13 and jax 0.12 wrote.
FOLDERS = "", "jax_0_12"
RUNS = [*make.RUNS, "jax_0_12/hope_linear"]

pytestmark = pytest.mark.versions


def numbers_of(folder):
  return json.loads((FOLDER / folder / "numbers.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The folder of all runs, unpacked; not to be changed."""
  folder = tmp_path_factory.mktemp("runs")
  for name in RUNS:
    with tarfile.open(FOLDER / f"{name}.tar.xz") as packed:
      packed.extractall((folder / name).parent, filter="data")
  return folder


@pytest.fixture
def run(runs, tmp_path):
  """A copy of one run, to continue with or to change."""
  return pathlib.Path(shutil.copytree(runs / "hope_linear", tmp_path / "run"))


def config_of(workdir):
  return build.from_plain(checkpoint.read_config(str(workdir)))


def go_on(workdir, config=None):
  config = config or config_of(workdir)
  net = build.model(config)
  dataset = build.dataset(config, net)
  return loop.train(
    model=net,
    optimizer=build.make_optimizer(config, net),
    data=dataset.train,
    batch_size=config.data.batch_size,
    sequence_length=config.data.sequence_length,
    workdir=str(workdir),
    config=build.plain(config),
    settings=build.settings(config),
    fingerprint=dataset.fingerprint,
    mesh=build.mesh(config, jax.devices()[:1]),
  )


def losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
  every = map(json.loads, lines)
  return [x["train/loss"] for x in every if "train/loss" in x]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_run_goes_on(folder, runs, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(runs / folder / "hope_linear", run)
  # The older one says no format, which is read as 1.
  assert ("format" in files.read_json(run / "config.json")) == (folder != "")
  done = go_on(run)
  assert done.step == make.STEPS == make.KEPT + 1
  loss = numbers_of(folder)["hope_linear"]["loss"]
  np.testing.assert_allclose(done.metrics["train/loss"], loss, atol=1e-4)


def test_losses_are_those_of_another_python(runs, tmp_path):
  other = runs / "jax_0_12" / "hope_linear"
  go_on(tmp_path, config_of(other))
  same = losses(tmp_path)[: make.KEPT]
  np.testing.assert_allclose(same, losses(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_memory_is_read(runs, name):
  net = build.model(config_of(runs / name))
  params, step = checkpoint.load_params(str(runs / name), net)
  reader, manifest = stream.go_on(net, params, FOLDER / f"{name}.memory")
  assert step == make.KEPT and manifest["tokens_seen"] == [len(make.TEXT)]
  # One piece, over the ends of chunks and of a segment.
  ids = tokenizers.Bytes().encode(make.NEXT)[:16]
  # What a leaf of the state says counts for 9e-4 at least.
  folder, _, run = name.rpartition("/")
  nats = numbers_of(folder)[run]["nats"][:16]
  np.testing.assert_allclose(reader.score(ids[None])[0], nats, atol=1e-4)
  (drawn,) = reader.sample(1, vocab_size=259, temperature=0)
  assert drawn == np.argmax(reader.logits[0, :259])


@pytest.mark.parametrize("name", others.MODELS)
def test_a_memory_of_another_model_is_read(name, tmp_path):
  net, folder = others.MODELS[name], FOLDER / "others"
  params = others.weights(net)
  numbers = json.loads((folder / "numbers.json").read_text("utf-8"))
  path = folder / f"{name}.memory"
  reader, manifest = stream.go_on(net, params, path, other_weights=True)
  assert manifest["format"] == 1
  # Kept again, it is one of this version.
  again = tmp_path / "again.memory"
  stream.save_memory(again, net, params, reader.state, logits=reader.logits)
  reader, manifest = stream.go_on(net, params, again)
  assert manifest["format"] == stream.FORMAT == 2
  nats = reader.score(others.NEXT)
  np.testing.assert_allclose(nats, numbers[name], atol=1e-3)


def test_a_changed_memory_of_before_is_refused(tmp_path):
  from safetensors import flax as safetensors

  net, source = others.MODELS["hope"], FOLDER / "others" / "hope.memory"
  leaves, path = safetensors.load(source.read_bytes()), tmp_path / "a.memory"
  name = "layers/memory/generators/w/w_out"
  leaves[name] = leaves[name][:, :, :, :1]
  manifest = {"nl_jax": json.dumps(stream.read_manifest(source))}
  path.write_bytes(safetensors.save(leaves, manifest))
  with pytest.raises(ValueError, match=f"does not fit this model: {name} is"):
    stream.load_memory(path, net, others.weights(net), other_weights=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_prepared_rows_are_read(folder):
  written = numbers_of(folder)["prepared"]
  folder = FOLDER / folder / "prepared"
  manifest = prepared.read_manifest(str(folder))
  for split, rows in written.items():
    table = prepared.Table(folder, split, manifest)
    taken = table.take(np.arange(len(table)))
    for key, values in rows.items():
      np.testing.assert_array_equal(taken[key], values)
  loaded = data.load(
    source="prepared", path=str(folder), text_key="text", tokenizer="bytes",
    sequence_length=32, batch_size=2, seed=0, alignment=8, vocab_size=264,
  )  # fmt: skip
  assert (
    next(loaded.train)["inputs"].tolist()[0] in (written["train"]["inputs"])
  )


SENTENCE = (
  " is a {} of format {}, and this version of nl_jax reads {}; update nl_jax, "
  "or {}"
)


def refused(what, otherwise, found=2, reads="format 1"):
  sentence = SENTENCE.format(what, found, reads, otherwise)
  return pytest.raises(formats.FormatError, match=sentence)


# A later format of runs and memory files, and what is read today.
LATER = 3, "formats 1 to 2"


def test_an_unknown_memory_is_refused(tmp_path):
  from safetensors import flax as safetensors

  source, path = FOLDER / "hope.memory", tmp_path / "new.memory"
  manifest = stream.read_manifest(source) | {"format": 3}
  leaves = safetensors.load(source.read_bytes())
  path.write_bytes(safetensors.save(leaves, {"nl_jax": json.dumps(manifest)}))
  with refused("memory", "read the text again", *LATER):
    stream.read_manifest(path)
  before = path.read_bytes()
  net = MODELS["transformer"]()
  params = net.init(jax.random.key(0))
  with refused("memory", "read the text again", *LATER):
    stream.save_memory(path, net, params, net.init_state(params, 1))
  assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_unknown_prepared_rows_are_refused(tmp_path, name):
  folder = pathlib.Path(shutil.copytree(FOLDER / "prepared", tmp_path / "new"))
  path = folder / name
  about = json.loads(path.read_text("utf-8")) | {"format": 2}
  path.write_text(json.dumps(about))
  with refused(name.split(".")[0], "prepare the corpus again"):
    if name == "manifest.json":
      prepared.read_manifest(str(folder))
    else:
      preparation_lib.open_folder(folder, about | {"format": 1})


def test_an_unknown_run_is_refused(run):
  files.write_json(
    run / "config.json", files.read_json(run / "config.json") | {"format": 3}
  )
  before = (run / "config.json").read_bytes()
  for read in (
    lambda: checkpoint.read_config(str(run)),
    lambda: files.claim(run, {}, "", allow_config_change=True),
  ):
    with refused("run", "train again in another --workdir", *LATER):
      read()
  assert (run / "config.json").read_bytes() == before


def test_an_unknown_checkpoint_is_refused_and_not_moved_aside(run):
  path = run / "checkpoints" / str(make.KEPT) / "meta" / "metadata"
  meta = unsealed(json.loads(path.read_text("utf-8")), "") | {"format": 3}
  path.write_text(json.dumps(sealed(meta)))
  net = build.model(config_of(run))
  for read in (
    lambda: go_on(run),
    lambda: checkpoint.load_params(str(run), net),
    lambda: checkpoint.check_origin(str(run), {}, params_only=True),
  ):
    with refused("checkpoint", "train again in another --workdir", *LATER):
      read()
  assert path.exists() and not (run / "damaged").exists()


def test_what_is_written_says_its_format(tmp_path):
  files.claim(tmp_path, {"a": 1}, "f")
  assert files.read_json(tmp_path / "config.json")["format"] == files.FORMAT
  state = {"step": jax.numpy.int32(3)}
  with checkpoint.Checkpoints(tmp_path) as saver:
    saver.save(3, state, {}, {})
    saver.wait()
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state,
    )
    assert saver.restore(like).meta["format"] == files.FORMAT
