"""The dimension legend, and the array aliases built from it.

B batch, T tokens in a sequence, C tokens in a chunk, N = T/C chunks, D model
width, H heads, K key width per head, V value width per head, M memory hidden
width, F feed-forward width, L layers. A vocabulary size is spelled out.
Shapes stand in the names of local variables: `k_BxTxHxK`.
"""

from collections.abc import Mapping
from typing import Any

import jax

Array = jax.Array
Params = Mapping[str, Any]  # Nested dicts of arrays.
