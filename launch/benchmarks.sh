#!/usr/bin/env bash
# What this machine's accelerator does with XL/2 at 256: attention, training step, sampling, as tables
# in a folder (benchmarks/results/NAME by default). Less than ten minutes on one H200.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-benchmarks/results/$(hostname)}
mkdir -p "$folder"
step=("$python" -m benchmarks.train_step --size=XL --dtype=bfloat16 --scan=1 --remat=dots)
"$python" -m benchmarks.attention --output="$folder/attention.json" | tee "$folder/attention.md"
"${step[@]}" --batch=64,128 --work=shared --profile --output="$folder/train_step.md"
"${step[@]}" --batch=64 --work=plain,shared --attention=xla --output="$folder/train_step_xla.md"
"$python" -m benchmarks.sampling --size=XL --input_size=32 --batch=64 --steps=1,4 \
  --decode_batch=8 --dtype=bfloat16 --decode_dtype=float32,bfloat16 --output="$folder/sampling.json"
