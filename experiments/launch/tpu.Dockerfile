# The image of a worker on GKE: experiments/launch/xpk.sh image
FROM python:3.11-slim
COPY . /nl_jax
WORKDIR /nl_jax
RUN pip install --no-cache-dir -c requirements.txt -e '.[train,tpu]'
