"""The bench of mixers: what is timed, and what is made of times."""

import jax
import numpy as np
import pytest

from experiments.bench import mixers as bench
from nl_jax.models import lm


@pytest.fixture
def times():
  """A gradient of the n-th mixer takes n T seconds, of attention n T²."""
  full = ("transformer", "hope_attention")
  return {
    kind: {
      name: [
        i * float(tokens) ** (1 + (name in full)) for tokens in bench._LENGTHS
      ]
      for i, name in enumerate(lm.MIXERS, 1)
    }
    for kind in bench._KINDS
  }


def test_growth_and_ratios_are_told_for_every_mixer(times):
  for row in bench._exponents(times):
    full = "transformer" in row["what"] or "hope_attention" in row["what"]
    np.testing.assert_allclose(row["ratio"], 2 if full else 1)
    assert row["target"] == ("reported" if full else "<= 1.5")
  rows = bench._ratios(times)
  assert len(rows) == 2 * len(bench._LENGTHS) * (len(lm.MIXERS) - 1)
  i, j = (list(lm.MIXERS).index(n) + 1 for n in ("retnet", "transformer"))
  ours = [row for row in rows if "retnet" in row["what"]]
  np.testing.assert_allclose(ours[0]["ratio"], i / (j * bench._LENGTHS[0]))


def test_the_picture_is_written_once(times, tmp_path):
  bench._draw(times, tmp_path / "rows.png")
  assert (tmp_path / "rows.png").stat().st_size > 10_000
  with pytest.raises(ValueError, match="rows.png exists: name another"):
    bench.run(None, str(tmp_path / "rows.json"))


@pytest.mark.parametrize("name", ["transformer", "rwkv7"])
def test_decoding_goes_on_where_the_text_ends(monkeypatch, name):
  """The timed tokens are those of one pass over text and tokens."""
  monkeypatch.setattr(bench, "_DECODED", 3)
  monkeypatch.setattr(bench, "_PIECE", 4)
  net = bench._model(name)
  assert net.whole or (net.heads, net.layers) == (1, 1)
  _, y = bench._decoding(net, 8)()
  mix = jax.jit(lambda p, x: bench._mix(net, p, x, None)[0])
  whole = mix(bench._layer(net), bench._draws(net, 11))
  np.testing.assert_allclose(y[:, 0, 0], whole[0, 8:], atol=1e-5)
  assert all(x.size for x in jax.tree.leaves(bench.gradient(net, 8)()))
