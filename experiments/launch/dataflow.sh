#!/usr/bin/env bash
# A corpus of a bucket to shards in it, by experiments.prepare on Dataflow.
#   bash experiments/launch/dataflow.sh COMMAND      variables: settings.sh, and
# SOURCE (text, jsonl, parquet), CORPUS and PREPARED (folders of the bucket),
# TOKENIZER (a file of this machine), WORKERS. Needs `pip install -e '.[beam]'`.
# image    builds and pushes the image of the workers, once a checkout
# prepare  makes the shards; the same command resumes where it was stopped
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=experiments/launch/settings.sh
source experiments/launch/settings.sh
: "${SOURCE:=jsonl}"
: "${CORPUS:=corpus}"
: "${PREPARED:=prepared}"
: "${TOKENIZER:=words.model}"
: "${WORKERS:=64}"
region=${ZONE%-*}
: "${IMAGE:=$region-docker.pkg.dev/$PROJECT/nl-jax/beam:latest}"

image() {
  local beam python
  beam=$(python -c "import apache_beam; print(apache_beam.__version__)")
  python=$(python -c "import sys; print('%d.%d' % sys.version_info[:2])")
  docker build -t "$IMAGE" --build-arg=BEAM="$beam" \
    --build-arg=PYTHON="$python" \
    -f experiments/launch/beam.Dockerfile .
  docker push "$IMAGE"
}

prepare() {
  python -m experiments.prepare --config="$CONFIG" --source="$SOURCE" \
    --path="gs://$BUCKET/$CORPUS" --out="gs://$BUCKET/$PREPARED" \
    --tokenizer="$TOKENIZER" --shard_megabytes=256 --beam="\
--runner=DataflowRunner --project=$PROJECT --region=$region \
--temp_location=gs://$BUCKET/beam --sdk_container_image=$IMAGE \
--max_num_workers=$WORKERS"
}

dispatch "image prepare" "$@"
