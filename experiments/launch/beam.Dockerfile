# The image of a worker of Dataflow: experiments/launch/dataflow.sh image
ARG BEAM
ARG PYTHON
FROM apache/beam_python${PYTHON}_sdk:${BEAM}
ARG BEAM
COPY . /nl_jax
RUN pip install --no-cache-dir -e '/nl_jax[beam]' "apache-beam[gcp]==${BEAM}"
# The pipeline's own module, which is no part of the installed package.
ENV PYTHONPATH=/nl_jax
