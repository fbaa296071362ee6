"""What a level is, in words and numbers: a row of the level card.

CMS levels, memories, attention and the levels of an optimizer are all described
by such a row (docs/mathematics.md 1; camera-ready Fig. 3).
"""

import dataclasses

NONPARAMETRIC = 0  # Chunk of what has no parameters to update: attention.
STEP = -1  # Chunk of what is updated once an optimizer step: a batch's tokens.
KINDS = (
  "memory",
  "feed-forward",
  "attention",
  "slow weights",
  "optimizer state",
)
TRANSFERS = ("parametric", "nonparametric", "backprop", "init", "generation")


@dataclasses.dataclass(frozen=True)
class LevelRow:
  """One component of a model or an optimizer, as the card says it.

  Attributes:
    name: what it is called in the paper and in the parameter tree.
    kind: one of `KINDS`.
    chunk: tokens between two of its updates; `STEP` for one optimizer step,
      `NONPARAMETRIC` for attention.
    bptt: its own states that the outer gradient passes through in a training
      sequence; 1 where updates are not differentiated; None for all of the
      sequence's tokens (printed L, as in the paper).
    objective: what its rule minimises.
    rule: how it learns.
    transfer: how knowledge reaches it or leaves it, one of `TRANSFERS`.
    state_bytes: of state that one sequence carries, over all layers.
    parameters: of the slow weights in it, over all layers.
    frozen: it changes in pre-training only; its chunk is that of pre-training.
    level: 1 for the fastest; filled in by `card.rank`.
    frequency: as printed; filled in by `card.rank`.
  """

  name: str
  kind: str
  chunk: int
  bptt: int | None = 1
  objective: str = "task loss"
  rule: str = "optimizer"
  transfer: str = "backprop"
  state_bytes: int = 0
  parameters: int = 0
  frozen: bool = False
  level: int = 0
  frequency: str = ""

  def __post_init__(self):
    for field, value, known in (
      ("kind", self.kind, KINDS),
      ("transfer", self.transfer, TRANSFERS),
    ):
      if value not in known:
        raise ValueError(
          f"row {self.name!r}: {field} must be one of {', '.join(known)}, "
          f"got {value!r}"
        )
