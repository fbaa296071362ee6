"""One model, one state: reads on, samples, and keeps what it has read.

`reader` has the stream; `memory_file` its state as a file; `states` what is
done with rows of a state; `rows` reads many texts at once, a row each; `drift`
says how far a memory has moved.
"""

from nl_jax.stream.memory_file import FORMAT as FORMAT
from nl_jax.stream.memory_file import check_place as check_place
from nl_jax.stream.memory_file import load_memory as load_memory
from nl_jax.stream.memory_file import model_hash as model_hash
from nl_jax.stream.memory_file import read_manifest as read_manifest
from nl_jax.stream.memory_file import save_memory as save_memory
from nl_jax.stream.memory_file import weights_hash as weights_hash
from nl_jax.stream.reader import Stream as Stream
from nl_jax.stream.reader import for_decoding as for_decoding
from nl_jax.stream.reader import go_on as go_on
from nl_jax.stream.reader import mesh_of as mesh_of
from nl_jax.stream.reader import start as start
from nl_jax.stream.states import Point as Point
from nl_jax.stream.states import clone as clone
from nl_jax.stream.states import detach as detach
from nl_jax.stream.states import reset as reset
from nl_jax.stream.states import take as take
