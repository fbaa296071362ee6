"""An LSTM with the functions of a language model, for formal languages.

It is here to check the harness: a correct one shows it perfect in all of them
(LONG Table 5, Irie et al. 2310.16076). Embedding, layers one on the other,
output weights of its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nl_jax.models import cms as cms_lib
from nl_jax.models import leaves as leaf


@dataclasses.dataclass(frozen=True)
class LSTM:
  """A stack of LSTM layers; a value of shapes with pure functions.

  Attributes:
    vocab_size: ids.
    width: D, also the units of a layer.
    layers: L.
    cms: no levels; the optimizer asks.
  """

  vocab_size: int
  width: int = 128
  layers: int = 2
  cms: cms_lib.Options = cms_lib.Options(("none",), (1,), (0,))

  def leaves(self) -> leaf.Leaves:
    """The table of the parameters; forget gates start at 1."""
    D, vocabulary = self.width, self.vocab_size
    normal = lambda key, shape: jax.random.normal(key, shape)
    scaled = lambda key, shape: normal(key, shape) * shape[0] ** -0.5
    forgets = lambda key, shape: jnp.repeat(jnp.eye(4)[1], D)
    named = ("vocab", "embed")
    made = {
      "embed": leaf.Leaf((vocabulary, D), named, normal, True, key=(0,)),
      "head": leaf.Leaf((D, vocabulary), named[::-1], scaled, True, key=(1,)),
    }
    for i in range(self.layers):
      axes = ("embed", "mlp")
      made[f"lstm_{i}/w"] = leaf.Leaf(
        (2 * D, 4 * D), axes, scaled, True, True, (2 + i,)
      )
      made[f"lstm_{i}/bias"] = leaf.Leaf((4 * D,), axes[1:], forgets)
    return made

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Parameters of `leaves`."""
    return leaf.drawn(self.leaves(), key)

  def apply(
    self,
    params: dict[str, Any],
    tokens_BxT: jax.Array,
    state: None = None,
    *,
    segment_ids: jax.Array | None = None,
  ) -> tuple[jax.Array, None, dict[str, Any]]:
    """Logits [B,T,Vocab] of rows whose padding comes last."""
    del state, segment_ids  # Nothing comes after padding.
    x_BxTxD = params["embed"][tokens_BxT]
    for i in range(self.layers):
      x_BxTxD = _layer(params[f"lstm_{i}"], x_BxTxD)
    return x_BxTxD @ params["head"], None, {}

  def levels(self) -> tuple[list, Any]:
    """No rows; every parameter is a slow weight."""
    return [], lambda params: jax.tree.map(lambda x: "slow", params)


def _layer(params: dict[str, jax.Array], x_BxTxD: jax.Array) -> jax.Array:
  """c = f c + i g, h = o tanh(c), with gates of (x, h)."""

  def token(carry: tuple, x_BxD: jax.Array) -> tuple:
    h, c = carry
    gates = jnp.concatenate([x_BxD, h], -1) @ params["w"] + params["bias"][None]
    i, f, g, o = jnp.split(gates, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h

  zero = jnp.zeros_like(x_BxTxD[:, 0])
  _, h_TxBxD = jax.lax.scan(token, (zero, zero), x_BxTxD.swapaxes(0, 1))
  return h_TxBxD.swapaxes(0, 1)
