# The image of a worker on GKE: experiments/launch/xpk.sh image
ARG PYTHON
FROM python:${PYTHON}-slim
COPY . /nl_jax
WORKDIR /nl_jax
RUN pip install --no-cache-dir -c requirements.txt -e '.[train,tpu]'
