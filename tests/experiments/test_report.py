"""Reports: every kind of run is drawn, and the page needs nothing else."""

import html.parser
import json
import math

import pytest

from experiments.configs import hope_tiny, transformer_tiny
from nl_jax import build
from nl_jax.report import charts, folder
from nl_jax.report import page as page_lib
from nl_jax.report import runs as runs_lib
from tests.experiments import test_commands

PNG = b"\x89PNG\r\n"


def line(step, **values):
  fixed = {"step": step, "tokens": 64 * step, "wall_time": 1e9 + step}
  return fixed | {
    "train/loss": 5.0 / step, "opt/grad_norm": 1.0, "opt/learning_rate": 1e-3,
    "opt/update_norm": 0.1, "perf/tokens_per_s": 32.0, "perf/data_wait": 0.01,
    "skipped": 0, **values,
  }  # fmt: skip


def memory(step):
  fields = ("inner_loss", "memory_norm", "update_norm", "eta_mean",
            "alpha_mean", "beta_mean")  # fmt: skip
  return {
    f"memory/{level}/{field}": 0.1 * step
    for level in ("memory", "generators")
    for field in fields
  } | {"opt/cms/high/update_norm": step % 2, "opt/slow/update_norm": 0.2}


def make_run(folder, module=hope_tiny, lines=None, **config):
  folder.mkdir()
  built = module.get_config("smoke")
  built.update_from_flattened_dict(config)
  about = {
    "config": build.plain(build.resolve(built)), "fingerprint": "f",
    "versions": {"jax": "1.2.3"}, "git": "0123456789abcdef",
  }  # fmt: skip
  (folder / "config.json").write_text(json.dumps(about))
  if lines is None:
    lines = [line(i, **memory(i)) for i in range(1, 9)]
    lines[3]["eval/validation/loss"] = 2.5
    lines[7] |= {"eval/validation/loss": 1.5,
                 "eval/validation/nat_per_byte": 1.25}  # fmt: skip
  text = "".join(json.dumps(x) + "\n" for x in lines)
  (folder / "metrics.jsonl").write_text(text)
  return folder


class Reader(html.parser.HTMLParser):
  """Text, and what a browser would fetch."""

  def __init__(self, page):
    super().__init__()
    self.words, self.fetched, self.tags, self.unnamed = [], [], [], 0
    self.feed(page)
    self.text = " ".join(self.words)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append(tag)
    for key in ("src", "href", "xlink:href"):
      if key in attrs and not attrs[key].startswith(("#", "data:")):
        self.fetched.append(attrs[key])
    if tag == "svg" and not attrs.get("aria-label"):
      self.unnamed += 1

  def handle_data(self, data):
    self.words.append(data.strip())


def report(out, *runs):
  page, picture = folder.write([str(run) for run in runs], out)
  assert picture.read_bytes().startswith(PNG)
  return Reader(page.read_text(encoding="utf-8"))


def test_one_run_with_memories(tmp_path):
  run = make_run(tmp_path / "run")
  (run / "sample.txt").write_text("<script>alert('x')</script> & more")
  (run / "results.json").write_text("{}\n")
  page = report(run, run)
  for text in ("1.2500", "Loss over tokens", "Inner loss of the memories",
               "Norm of a write", "Learning rate of the memories",
               "self-modifying Titans", "jax", "1.2.3", "0123456789ab",
               "model.mixer.chunk_gen", "512", "alert('x')"):  # fmt: skip
    assert text in page.text, text
  assert "script" not in page.tags
  assert not page.fetched and not page.unnamed
  assert page.tags.count("svg") >= 8 and "th" in page.tags


def test_the_same_run_gives_the_same_page(tmp_path):
  run = make_run(tmp_path / "run")
  folder.write([str(run)], run)
  first = (run / "report.html").read_bytes()
  folder.write([str(run)], run)
  assert (run / "report.html").read_bytes() == first


def test_runs_side_by_side(tmp_path):
  one = make_run(tmp_path / "one")
  lines = [line(i) for i in range(1, 5)]
  two = make_run(tmp_path / "two", transformer_tiny, lines, **{"data.seed": 7})
  page = report(tmp_path / "out", one, two)
  assert "one, train" in page.text and "two, train" in page.text
  assert "fields differ." in page.text and "data.seed" in page.text
  assert "one is not done: step 8 of 20." in page.text
  same = make_run(tmp_path / "out" / "one")
  page = report(tmp_path / "out", one, same)
  assert str(one) in page.text and str(same) in page.text
  assert "0 fields differ." in page.text


def test_runs_with_other_tokenizers_share_no_panel_of_loss(tmp_path):
  one = make_run(tmp_path / "one")
  two = make_run(tmp_path / "two", transformer_tiny)
  (two / "config.json").write_text(json.dumps({
    **json.loads((two / "config.json").read_text()),
    "tokenizer": {"file": "w.model", "sha256": {"w.model": "ab" * 32}},
  }))  # fmt: skip
  read = [runs_lib.read(str(x)) for x in (one, two)]
  panels = [p for p in charts.panels(read) if "Loss (" in p.title]
  assert [p.title for p in panels[:2]] == [
    "Loss (nat per token of bytes)", "Loss (nat per token of w.model)",
  ]  # fmt: skip
  assert all(len({c.run for c in p.curves}) == 1 for p in panels)
  page = page_lib.page(read, [], ["", ""])
  assert "These runs have 2 tokenizers" in page
  alone = page_lib.page(read[:1], [], [""])
  assert "tokenizers" not in alone.split("Figures")[0]


def test_the_loss_is_drawn_raw_and_as_a_mean_and_validation_as_a_line(tmp_path):
  run = runs_lib.read(str(make_run(tmp_path / "a")))
  panel = charts.panels([run])[0]
  raw, mean, validation = panel.curves
  assert raw.faint and not raw.label and mean.label == "train"
  assert raw.ys == [5.0 / i for i in range(1, 9)]
  assert mean.ys[0] == raw.ys[0] and mean.ys[-1] == raw.ys[-1]
  assert mean.ys[3] == pytest.approx(sum(raw.ys[2:5]) / 3)
  assert validation.label == "validation" and validation.ys == [2.5, 1.5]
  assert validation.marks and not validation.dots
  assert raw.colour == mean.colour != validation.colour
  gaps = charts.running_mean([1.0, math.nan, *[3.0] * 6])
  assert math.isnan(gaps[1]) and [*gaps[:1], *gaps[2:]] == [1.0] + [3.0] * 6


def test_lines_that_lie_on_each_other_are_seen(tmp_path):
  curve = charts.Curve
  xs, ys = [1, 2, 3], [0.0, 1.0, 2.0]
  near = [0.001, 1.001, 1.999]
  panel = charts.Panel("a", "x", [
    curve("one", xs, ys, 0), curve("two", xs, near, 1),
    curve("apart", xs, ys[::-1], 2),
  ])  # fmt: skip
  assert charts.covered(panel) == {0: 1}


def test_what_changed_and_where_it_came_from_is_told(tmp_path):
  folder = make_run(tmp_path / "a$b^{")  # A name is not a formula.
  about = json.loads((folder / "config.json").read_text())
  about["changes"] = [{"step": 4, "changes": ["optim.b1: 0.9 -> 0.8"]}]
  about["chain"] = [
    {
      "step": 9,
      "workdir": "runs/x",
      "keep": "all",
      "source": "text",
      "path": "a.txt",
      "fingerprint": "",
    }
  ]
  (folder / "config.json").write_text(json.dumps(about))
  run = runs_lib.read(str(folder))
  page = Reader(page_lib.page([run], [], [""]))
  assert "changed at step 4: optim.b1: 0.9 -> 0.8." in page.text
  assert "came from step 9 of runs/x, trained on text a.txt" in page.text
  assert charts.panels([run])[0].changes == (256,)


def test_gaps_torn_lines_and_single_lines(tmp_path):
  lines = [line(i) for i in range(1, 6)]
  lines[2]["train/loss"] = None
  run = make_run(tmp_path / "a", transformer_tiny, lines)
  with (run / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "tok')
  page = report(run, run)
  assert "1 logged steps were not finite" in page.text
  assert "1 torn lines" in page.text
  _, ys = runs_lib.read(str(run)).series("train/loss")
  assert [math.isnan(y) for y in ys] == [False, False, True, False, False]
  alone = make_run(tmp_path / "b", transformer_tiny, [line(1)])
  assert "Loss over tokens" in report(alone, alone).text


def test_damaged_lines_are_left_out_and_damaged_values_are_gaps(tmp_path):
  lines = [line(i) for i in range(1, 6)]
  lines[2]["train/loss"] = "low"
  lines[3]["opt/grad_norm"] = 10**400
  run = make_run(tmp_path / "a", transformer_tiny, lines)
  with (run / "metrics.jsonl").open("ab") as file:
    file.write(b'\xff\n{"step": "7", "tokens": [], "wall_time": {}}\n[3]\n')
  page = report(run, run)
  assert "3 torn lines" in page.text
  xs, _ = runs_lib.read(str(run)).series("train/loss", "step")
  assert xs == [1, 2, 4, 5]


NAMES = [
  "$x$", r"a $\frac", "_hidden", "<b>&amp;'\"|", "{0}%s", "two\nlines",
  "half \udcff", "long" * 60,
]  # fmt: skip


def test_names_are_drawn_as_they_are(tmp_path):
  lines = [line(i) for i in range(1, 3)]
  runs = [make_run(tmp_path / x, transformer_tiny, lines) for x in NAMES]
  page = report(tmp_path / "out", *runs)
  drawn = [text for text in page.words if text.endswith(", train")]
  assert len(drawn) == 2 * len(NAMES) and not page.fetched
  for name in NAMES:
    if name.isprintable() and len(name) < 100:
      assert drawn.count(f"{name}, train") == 2, name


def test_seconds_are_of_training_whatever_the_clock_says(tmp_path):
  lines = [line(i) for i in range(1, 4)]
  lines[2]["wall_time"] += 1e6  # Stopped over night.
  run = runs_lib.read(str(make_run(tmp_path / "a", lines=lines)))
  assert run.seconds() == pytest.approx([2.0, 4.0, 6.0])


def test_updates_of_a_level_that_rests_are_gaps_not_zeros(tmp_path):
  run = runs_lib.read(str(make_run(tmp_path / "a")))
  panel = [p for p in charts.panels([run]) if "outer update" in p.title]
  high = [c for c in panel[0].curves if c.label == "cms/high"]
  assert [y == y for y in high[0].ys] == [i % 2 == 1 for i in range(1, 9)]


def test_a_config_of_another_version_is_said(tmp_path):
  run = make_run(tmp_path / "a")
  about = json.loads((run / "config.json").read_text())
  about["config"]["model"]["unheard_of"] = 1
  (run / "config.json").write_text(json.dumps(about))
  assert "not drawn: this version does not read" in report(run, run).text


def test_mistakes_are_sentences(tmp_path):
  with pytest.raises(ValueError, match="no folder"):
    folder.write([str(tmp_path / "no")], tmp_path)
  with pytest.raises(ValueError, match="no run in"):
    folder.write([str(tmp_path)], tmp_path)
  empty = make_run(tmp_path / "a", lines=[])
  with pytest.raises(ValueError, match="has no line yet"):
    folder.write([str(empty)], tmp_path)
  run = make_run(tmp_path / "b")
  (tmp_path / "file").write_text("precious")
  with pytest.raises(ValueError, match="file is a file"):
    folder.write([str(run)], tmp_path / "file")
  assert (tmp_path / "file").read_text() == "precious"


def test_the_command_names_what_it_wrote(tmp_path):
  run = make_run(tmp_path / "run")
  got = test_commands.run(
    "report", f"--workdir={run}", f"--out={tmp_path / 'out'}"
  )
  assert got.returncode == 0, got.stderr
  assert got.stdout.split() == [
    str(tmp_path / "out" / "report.html"), str(tmp_path / "out" / "report.png")
  ]  # fmt: skip
  none = test_commands.run("report")
  assert none.returncode == 1 and "--workdir is required" in none.stderr
