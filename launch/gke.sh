#!/usr/bin/env bash
# A run on a TPU slice of a GKE cluster (the one kubectl is at), by the Job in launch/gke.yaml.
#   export NAME=dmf IMAGE=us-docker.pkg.dev/PROJECT/dmf/dmf:1 HOSTS=4 CHIPS_PER_HOST=4
#   export ACCELERATOR=tpu-v6e-slice TOPOLOGY=4x4
#   bash launch/gke.sh [--dry-run] image            builds IMAGE by launch/Dockerfile and pushes it
#   bash launch/gke.sh [--dry-run] apply -- --config=configs/dmf_xl2_256.py --workdir=gs://...
#   bash launch/gke.sh [--dry-run] logs [FLAGS]     FLAGS go to kubectl logs (--tail=-1)
#   bash launch/gke.sh [--dry-run] delete           SIGTERM: the run saves and ends
#
# What follows -- are the flags of dmf train. With --dry-run, `apply` prints the YAML. IMAGE names a
# place that docker may push to (`gcloud auth configure-docker us-docker.pkg.dev` once); an image of
# another origin must have dmf[tpu,gcs] and, in its working directory, configs/. Its tag should
# change with its content: a node keeps the images that it has. HOSTS x CHIPS_PER_HOST is the size of
# TOPOLOGY. SERVICE_ACCOUNT (default) must be allowed to write to the bucket. If several node pools
# have the same topology, add a nodeSelector for cloud.google.com/gke-nodepool.
set -euo pipefail
dry=''
[ "${1:-}" != --dry-run ] || { dry=1 && shift; }
run() { if [ "$dry" ]; then printf '%q ' "$@" && echo; else "$@"; fi; }
fail() { echo "gke.sh: $1" >&2 && exit 2; }
verb=${1:-}
[ $# -eq 0 ] || shift
[ "$verb" = image ] || : "${NAME:?what to call the Job}"

case $verb in
  image)
    : "${IMAGE:?what to call the image, as us-docker.pkg.dev/PROJECT/dmf/dmf:1}"
    # The hosts of TPUs are x86-64, whatever this machine is.
    run docker build --platform=linux/amd64 --file="$(dirname "$0")/Dockerfile" --tag="$IMAGE" \
      "$(dirname "$0")/.."
    run docker push "$IMAGE"
    ;;
  apply)
    : "${IMAGE:?the image with dmf}" "${ACCELERATOR:?the TPU, as tpu-v6e-slice}"
    : "${TOPOLOGY:?the shape of the slice, as 4x4}" "${HOSTS:?the number of hosts of the slice}"
    : "${CHIPS_PER_HOST:?the chips of a host, as 4}"
    [ "${1:-}" = -- ] && [ $# -gt 1 ] || fail "apply: give the flags of dmf train after --"
    shift
    arguments=''
    for argument in "$@"; do # as YAML quotes: '' within '...'
      arguments+="${arguments:+, }'${argument//\'/\'\'}'"
    done
    yaml=$(< "$(dirname "$0")/gke.yaml")
    yaml=${yaml//@RETRIES@/$((3 * HOSTS))}
    SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
    for field in NAME IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS_PER_HOST SERVICE_ACCOUNT; do
      yaml=${yaml//"@$field@"/"${!field}"}
    done
    yaml=${yaml//"@ARGUMENTS@"/"$arguments"}
    if [ "$dry" ]; then echo "$yaml"; else kubectl apply --filename=- <<< "$yaml"; fi
    ;;
  logs)
    run kubectl logs "--selector=job-name=$NAME" --prefix --follow --tail=50 \
      --max-log-requests=1000 "$@"
    ;;
  delete) run kubectl delete "job/$NAME" "service/$NAME" ;;
  *) fail "give one of image, apply, logs, delete" ;;
esac
