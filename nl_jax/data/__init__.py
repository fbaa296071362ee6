"""Data: from text to batches, deterministic and resumable to the token.

`load` binds a source (`sources`), a tokenizer (`tokenizers`) and the packer
(`packing`) to the pipeline of batches (`pipeline`, the only file that imports
grain, and only when a data set is loaded).
"""

from nl_jax.data.dataset import Counts as Counts
from nl_jax.data.dataset import Dataset as Dataset
from nl_jax.data.dataset import infer as infer
from nl_jax.data.dataset import load as load
