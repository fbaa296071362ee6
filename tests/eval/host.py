"""One host of two that score together: python -m tests.eval.host PORT NUMBER.

Prints the scores of the rows of test_scoring.
"""

import sys

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))

from nl_jax import sharding  # noqa: E402
from nl_jax.eval import scoring  # noqa: E402
from tests.eval import test_scoring  # noqa: E402

model, _ = test_scoring.made("transformer")
mesh = sharding.mesh()
shapes = jax.eval_shape(model.init, jax.random.key(0))
shardings = sharding.param_shardings(shapes, model.axes(), mesh)
params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
scorer = scoring.Scorer(model, test_scoring.VOCAB, mesh)
print(*scorer(params, test_scoring.pairs()).lls)
