"""Memories: what learns from tokens, as pure functions on NamedTuples.

`linear` and `mlp` are memories with one signature (init, start, read,
update); `self_modifying` couples several of them (paper eq. 83-90); `rule`
says how any of them learns, but for `simplex`, whose rule is its own, `block`
and `writing` what a chunk writes; `chunked` walks them over chunks; `spans`
sets local ones beside a global one.
"""

from nl_jax.memory import chunked as chunked
from nl_jax.memory import linear as linear
from nl_jax.memory import mlp as mlp
from nl_jax.memory import objectives as objectives
from nl_jax.memory import self_modifying as self_modifying
from nl_jax.memory import simplex as simplex
from nl_jax.memory import spans as spans
from nl_jax.memory.chunked import MemoryState as MemoryState
from nl_jax.memory.chunked import Run as Run
from nl_jax.memory.rule import Gates as Gates
from nl_jax.memory.rule import Metrics as Metrics
from nl_jax.memory.rule import Rule as Rule
