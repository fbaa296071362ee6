"""Schedules of the outer learning rate, by name.

Each begins with a linear warm-up: step i (from 0) of it has rate
peak (i + 1) / warmup_steps, so that no step is lost at rate 0. Then, with the
floor min_ratio * peak:

    cosine        half a cosine down to the floor at the last step
    linear        a line down to the floor at the last step
    constant      the peak
    wsd           the peak, and a cooldown: warm-up, stable, decay
    inverse_root  peak sqrt(w / (i + 1)), w = max(warmup_steps, 1), at least the
                  floor; then a cooldown, where there is one

A cooldown is a line from the rate where it begins down to the floor, over the
last `cooldown_steps` of the run. So a run at a constant rate can be cooled down
from any of its checkpoints, in another workdir: MiniCPM (arXiv 2404.06395).
"""

import jax
import jax.numpy as jnp
import optax

NAMES = ("cosine", "linear", "constant", "wsd", "inverse_root")
_COOLED = ("wsd", "inverse_root")


def make(
  name: str,
  *,
  peak: float,
  warmup_steps: int,
  steps: int,
  min_ratio: float,
  cooldown_steps: int = 0,
) -> optax.Schedule:
  """The schedule of a run.

  Args:
    name: one of `NAMES`.
    peak: the largest rate.
    warmup_steps: of the linear warm-up.
    steps: of the whole run.
    min_ratio: the floor over the peak.
    cooldown_steps: of wsd, and of inverse_root.

  Returns:
    step (from 0) -> learning rate.

  Raises:
    ValueError: an unknown name, or steps that do not fit.
  """
  check(name, warmup_steps, steps, cooldown_steps)
  last = max(steps - 1 - warmup_steps, 1)

  def stable(count: jax.Array) -> jax.Array:
    """Of the peak, after the warm-up and before the cooldown."""
    done = jnp.clip((count - warmup_steps) / last, 0, 1)
    if name == "cosine":
      return min_ratio + (1 - min_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    if name == "linear":
      return 1 - (1 - min_ratio) * done
    if name == "inverse_root":
      root = jnp.sqrt(max(warmup_steps, 1) / (count + 1))
      return jnp.maximum(root, min_ratio)
    return jnp.ones_like(count)

  def rate(count: jax.typing.ArrayLike) -> jax.Array:
    count = jnp.asarray(count, jnp.float32)
    warm = (count + 1) / max(warmup_steps, 1)
    left = steps - cooldown_steps
    ratio = stable(jnp.minimum(count, left) if cooldown_steps else count)
    if cooldown_steps:
      cooled = jnp.clip((count + 1 - left) / cooldown_steps, 0, 1)
      ratio = ratio + (min_ratio - ratio) * cooled
    return peak * jnp.where(count < warmup_steps, warm, ratio)

  return rate


def check(
  name: str, warmup_steps: int, steps: int, cooldown_steps: int
) -> None:
  """Raises ValueError for an unknown name or steps that do not fit."""
  if name not in NAMES:
    raise ValueError(
      f"optim.schedule must be one of {', '.join(NAMES)}; got {name!r}"
    )
  if cooldown_steps < 0:
    raise ValueError(
      f"optim.cooldown_steps must be at least 0, got {cooldown_steps}"
    )
  if cooldown_steps and name not in _COOLED:
    raise ValueError(
      f"optim.schedule={name!r} has no cooldown, got optim.cooldown_steps="
      f"{cooldown_steps}: set it to 0, or use {' or '.join(_COOLED)}"
    )
  if name == "wsd" and not cooldown_steps:
    raise ValueError(
      "optim.schedule='wsd' needs optim.cooldown_steps of at least 1; use "
      "'constant' for none"
    )
  if cooldown_steps and warmup_steps + cooldown_steps > steps:
    raise ValueError(
      "optim.warmup_steps + optim.cooldown_steps must be at most train.steps, "
      f"got {warmup_steps} + {cooldown_steps} > {steps}"
    )
