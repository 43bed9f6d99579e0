#!/usr/bin/env bash
# What this machine's accelerator does with XL/2 at 256: attention, training step, sampling, as tables
# in a folder (benchmarks/results/NAME by default). PYTHON names an interpreter with dmf and JAX for
# the accelerator. Meant to take less than ten minutes on one GPU, which was not measured.
# SIZE=S SIDE=8 BATCH=2 ROUNDS=1 tries the whole of it without one (SIDE is of the sampled latents).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-benchmarks/results/$(hostname)}
size=${SIZE:-XL} side=${SIDE:-32} batch=${BATCH:-64} rounds=${ROUNDS:-5}
mkdir -p "$folder"
step=("$python" -m benchmarks.train_step --size="$size" --dtype=bfloat16 --scan=1 --remat=dots
  --rounds="$rounds")
"$python" -m benchmarks.attention --rounds="$rounds" --output="$folder/attention.json" \
  | tee "$folder/attention.md"
"${step[@]}" --batch="$batch,$((2 * batch))" --sharing=shared --profile --output="$folder/train_step.md"
"${step[@]}" --batch="$batch" --sharing=plain,shared --attention=xla --output="$folder/train_step_xla.md"
"$python" -m benchmarks.sampling --size="$size" --input-size="$side" --batch="$batch" --steps=1,4 \
  --decode-batch="$((batch < 8 ? batch : 8))" --dtype=bfloat16 --decode-dtype=float32,bfloat16 \
  --rounds="$rounds" --output="$folder/sampling.json"
