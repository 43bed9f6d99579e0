#!/usr/bin/env bash
# A run on Cloud TPU VMs: one slice or several, asked for as a queued resource.
#   NAME=dmf ZONE=us-east5-b TYPE=v6e-16 bash launch/tpu_pod.sh [--dry-run] VERB ...
#
#   create [FLAGS]   asks for the TPUs; FLAGS go to gcloud (--service-account=..., --network=...)
#   status           ACTIVE when they are there, SUSPENDED when they were taken away
#   install WHAT     a wheel or sdist of this project, or git+https://...@BRANCH; and configs/
#   run FLAGS        dmf train FLAGS on every host, detached; the workdir must be gs://...
#   logs [FLAGS]     the end of every host's log; FLAGS go to tail (-n 1000, -f)
#   stop             SIGTERM: the run saves and ends; the same `run` goes on
#   delete           gives the TPUs back
#
# From the environment: NAME and ZONE; PROJECT (gcloud's own if unset); for `create`, TYPE
# (v5litepod-16, v6e-16, v5p-8), VERSION of the runtime (chosen by TYPE if unset), SPOT=1 and
# SLICES=2. Hosts are reached by SSH, all at once: first `ssh-add ~/.ssh/google_compute_engine`.
# Spot TPUs are taken away for good, with 30 seconds' notice: delete, create, install and run again.
set -euo pipefail
dry=''
[ "${1:-}" != --dry-run ] || { dry=1 && shift; }
run() { if [ "$dry" ]; then printf '%q ' "$@" && echo; else "$@"; fi; }
fail() { echo "tpu_pod.sh: $1" >&2 && exit 2; }
verb=${1:-}
[ $# -eq 0 ] || shift
: "${NAME:?what to call the TPUs}" "${ZONE:?a zone, as us-east5-b}"
tpus=(gcloud compute tpus queued-resources)
where=("--zone=$ZONE")
[ -z "${PROJECT:-}" ] || where+=("--project=$PROJECT")
everywhere=("${where[@]}" --node=all --worker=all)
on_hosts() { run "${tpus[@]}" ssh "$NAME" "${everywhere[@]}" "--command=$1"; }

case $verb in
  create)
    : "${TYPE:?a type and size of TPU, as v5litepod-16, v6e-16 or v5p-8}"
    case $TYPE in
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      v4-*) version=tpu-ubuntu2204-base ;;
      *) version=${VERSION:?the runtime version, which is not known for TYPE=$TYPE} ;;
    esac
    nodes=("--node-id=$NAME")
    [ "${SLICES:-1}" = 1 ] || nodes=("--node-count=$SLICES")
    [ "${SPOT:-}" != 1 ] || nodes+=(--spot)
    run "${tpus[@]}" create "$NAME" "${where[@]}" "--accelerator-type=$TYPE" \
      "--runtime-version=${VERSION:-$version}" "${nodes[@]}" "$@"
    ;;
  status) run "${tpus[@]}" describe "$NAME" "${where[@]}" "--format=value(state.state)" ;;
  install)
    what=${1:?install a wheel, an sdist or git+https://...}
    copied=("$(dirname "$0")/../configs")
    case $what in
      git+*) source=$what ;;
      *)
        [ -f "$what" ] || fail "install $what: no such file"
        copied+=("$what")
        source="file://\$HOME/${what##*/}"
        ;;
    esac
    run "${tpus[@]}" scp --recurse "${copied[@]}" "$NAME:" "${everywhere[@]}"
    # The runtimes' own Python is 3.10.
    on_hosts "python3 -m pip install --quiet --user uv \
&& python3 -m uv venv --quiet --allow-existing --python=3.12 dmf-venv \
&& python3 -m uv pip install --quiet --python=dmf-venv --reinstall-package=dmf-jax \
\"dmf-jax[tpu,gcs] @ $source\""
    ;;
  run)
    [ $# -gt 0 ] || fail "run: give the flags of dmf train"
    on_hosts "if kill -0 \"\$(cat dmf.pid 2> /dev/null)\" 2> /dev/null; then \
echo \"\$(hostname): a run goes on already\" >&2; exit 1; fi; \
nohup dmf-venv/bin/dmf train $(printf '%q ' "$@")>> dmf.log 2>&1 < /dev/null & echo \$! > dmf.pid"
    ;;
  logs)
    [ $# -gt 0 ] || set -- -n 50
    on_hosts "tail $(printf '%q ' "$@")dmf.log | sed -u \"s/^/\$(hostname): /\""
    ;;
  stop) on_hosts "kill -TERM \"\$(cat dmf.pid)\"" ;;
  delete) run "${tpus[@]}" delete "$NAME" "${where[@]}" --force --quiet "$@" ;;
  *) fail "give one of create, status, install, run, logs, stop, delete" ;;
esac
