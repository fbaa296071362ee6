# The image of a worker of Dataflow: experiments/launch/dataflow.sh image
ARG BEAM
FROM apache/beam_python3.11_sdk:${BEAM}
ARG BEAM
COPY . /nl_jax
RUN pip install --no-cache-dir -e '/nl_jax[beam]' "apache-beam[gcp]==${BEAM}"
# The pipeline's own module, which is no part of the installed package.
ENV PYTHONPATH=/nl_jax
