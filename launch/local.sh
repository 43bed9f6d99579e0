#!/usr/bin/env bash
# Several processes of one run on this machine, one for each GPU.
#   bash launch/local.sh [--dry-run] [--processes=N] [--port=12321] -- \
#     dmf train --config=configs/digits_sit.py --workdir=runs/digits_sit
# A single process uses all GPUs of its machine already, and needs none of this: `dmf train ...`.
#
# Copy i of the command gets --coordinator=localhost:PORT --processes=N --process=i and, where there
# are NVIDIA GPUs, CUDA_VISIBLE_DEVICES=i (the i-th of those in it, if it is set; empty or -1 means
# none). N is their number unless given. SIGTERM goes to every copy: they save and end with 75. When
# a copy fails, the others get SIGTERM and a minute; the exit code is the first that is not 0. Needs
# bash 5.1.
set -euo pipefail
dry='' processes='' port=12321
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1 ;;
    --processes=*) processes=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --) shift && break ;;
    *) echo "local.sh: $1: give [--dry-run] [--processes=N] [--port=PORT] -- COMMAND" >&2; exit 2 ;;
  esac
  shift
done
[ $# -gt 0 ] || { echo "local.sh: give the command after --" >&2; exit 2; }

gpus=()
if found=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null); then
  mapfile -t gpus < <(tr , '\n' <<< "${CUDA_VISIBLE_DEVICES-$found}" | grep -vxE ' *(-1)? *')
fi
processes=${processes:-${#gpus[@]}}
[[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "local.sh: give --processes=N" >&2; exit 2; }
if [ ${#gpus[@]} -gt 0 ] && [ ${#gpus[@]} -lt "$processes" ]; then
  echo "local.sh: --processes=$processes: there are ${#gpus[@]} GPUs" >&2
  exit 2
fi

declare -A running=()
pass_on() { kill "-$1" "${!running[@]}" 2> /dev/null || true; }
trap 'pass_on TERM' TERM INT
for ((i = 0; i < processes; i++)); do
  copy=("$@" "--coordinator=localhost:$port" "--processes=$processes" "--process=$i")
  [ ${#gpus[@]} -eq 0 ] || copy=(env "CUDA_VISIBLE_DEVICES=${gpus[i]}" "${copy[@]}")
  if [ "$dry" ]; then
    printf '%q ' "${copy[@]}" && echo
  else
    "${copy[@]}" &
    running[$!]=$i
  fi
done

code=0
while [ ${#running[@]} -gt 0 ]; do
  status=0 ended=''
  wait -n -p ended || status=$?
  if [ -z "${ended:-}" ]; then # a signal came, and was passed on
    [ "$status" -gt 128 ] || exit "$status"
    continue
  fi
  unset "running[$ended]"
  [ "$code" != 0 ] || code=$status
  case $status in 0 | 75) ;; *) break ;; esac # 75: told to stop; the others are saving, too
done
if [ ${#running[@]} -gt 0 ]; then
  pass_on TERM
  for ((second = 0; second < 60; second++)); do
    kill -0 "${!running[@]}" 2> /dev/null || break
    sleep 1
  done
  pass_on KILL
fi
exit "$code"
