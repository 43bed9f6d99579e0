#!/usr/bin/env bash
# Emoji in colour, 32 x 32 pixels: draws the images, trains a flow model and its flow map, and makes the
# two pictures of README. Every line is a command to use on its own; what was already trained is not
# trained again. The font is found where the system has it, or named by FONT=FILE.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh "."

python examples/emoji.py --output=runs/emoji ${FONT:+--font="$FONT"}
dmf prepare --source=runs/emoji --output=runs/emoji_32 --resolution=32

dmf train --config=configs/emoji_sit.py --workdir=runs/emoji_sit
dmf train --config=configs/emoji_dmf.py --workdir=runs/emoji_dmf

# From the same noise: the flow model, and the flow map, which was trained with guidance of scale 2.
shown=("--labels=people,smileys,flags,symbols,hands" --count=20 --seed=3)
dmf sample --checkpoint=runs/emoji_sit --steps=1,4,32 --config.sampling.guidance.scale=2 \
  --output=runs/emoji_flow_model.png "${shown[@]}"
dmf sample --checkpoint=runs/emoji_dmf --steps=1,2,4 --output=runs/emoji_flow_map.png "${shown[@]}"
