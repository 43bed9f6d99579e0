#!/usr/bin/env bash
# The first minutes on an accelerator, in five parts, the most valuable first:
#   correctness   the attention kernel and a small training step, compared with the CPU
#   train_step    XL/2 at 256: the best batch size, MFU and longest operations
#   attention     the kernels and plain JAX at 256 and 1,024 tokens
#   sampling      1 and 4 steps, and the share of the decoder
#   digits        training on the digits at width 512, until SECONDS_IN_ALL are over
#   PYTHON=python3.12 bash launch/benchmarks.sh [FOLDER]
# PYTHON names an interpreter with JAX for the accelerator; the packages that it lacks are named
# first. Each part writes FOLDER/PART.log, and tables beside it (benchmarks/results/HOST by default).
# A part that fails or takes longer than its limit does not stop the others: the last line names it,
# and the exit code is 1. Meant to take 8 minutes on one H100, which was not measured.
# SIZE=S SIDE=8 BATCH=2 ROUNDS=1 tries the whole of it on a CPU (SIDE is of the sampled latents):
# unless SIZE is XL, the digits are trained for 20 steps at width 64. PATIENCE=N makes all limits N
# times as long.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
folder=${1:-benchmarks/results/$(hostname)}
size=${SIZE:-XL} side=${SIDE:-32} batches=${BATCH:-128,256} rounds=${ROUNDS:-5}
total=${SECONDS_IN_ALL:-480} width=512 steps=1000000 patience=${PATIENCE:-1}
[ "$size" = XL ] || width=64 steps=20
batch=${batches%%,*} failed=()
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
# Where the platform is named, the CPU must be, too: it is compared with.
case ${JAX_PLATFORMS:-cpu} in *cpu*) ;; *) export JAX_PLATFORMS=$JAX_PLATFORMS,cpu ;; esac
mkdir -p "$folder" && run=$(mktemp -d) || exit
trap 'rm -rf "$run"' EXIT

part() { # NAME LIMIT COMMAND...: one part, ended after LIMIT seconds
  local name=$1 limit=$(($2 * patience)) began=$SECONDS code
  shift 2
  printf '\n== %s: at most %s s\n' "$name" "$limit"
  timeout --foreground --kill-after=15 "$limit" "$@" 2>&1 | tee "$folder/$name.log"
  code=${PIPESTATUS[0]}
  printf '== %s: ended with %s after %s s\n' "$name" "$code" $((SECONDS - began))
  case $code in 0 | 75) ;; *) failed+=("$name") ;; esac # 75: dmf train was told to stop, and saved
}

"$python" -m benchmarks.missing_packages
case $size in XL) lengths=256,1024 ;; *) lengths=64 ;; esac
part correctness 80 "$python" -m benchmarks.correctness --lengths="$lengths" \
  --output="$folder/correctness.md"
part train_step 150 "$python" -m benchmarks.train_step --size="$size" --dtype=bfloat16 --scan=1 \
  --remat=dots --sharing=shared --batch="$batches" --rounds="$rounds" --compile-within=55 --profile \
  --output="$folder/train_step.md"
part attention 70 "$python" -m benchmarks.attention --rounds="$rounds" \
  --output="$folder/attention.json"
part sampling 90 "$python" -m benchmarks.sampling --size="$size" --input-size="$side" \
  --batch="$batch" --steps=1,4 --decode-batch="$((batch < 8 ? batch : 8))" --dtype=bfloat16 \
  --decode-dtype=bfloat16 --nostablehlo --rounds="$rounds" --output="$folder/sampling.json"
left=$((total - SECONDS > 75 ? total - SECONDS : 75))
part digits "$left" timeout --foreground --preserve-status $(((left - 15) * patience)) \
  "$python" -m dmf train --config=configs/digits_dmf.py --workdir="$run/digits" \
  --config.init.checkpoint= --config.model.width="$width" --config.model.heads=8 \
  --config.model.scan=True --config.model.dtype=bfloat16 --config.optimizer.schedule=constant \
  --config.optimizer.learning_rate=3e-4 --config.run.steps="$steps" --config.run.log_every=10 \
  --config.run.sample_every=0 --config.run.checkpoint_every=0
cp "$run/digits/metrics.jsonl" "$folder/digits.jsonl" && [ -s "$folder/digits.jsonl" ] ||
  failed+=(digits.jsonl)

printf '\n%s\n' "$folder: ${failed[*]:+failed: ${failed[*]}; }${SECONDS} s in all"
[ ${#failed[@]} = 0 ]
