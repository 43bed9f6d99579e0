#!/usr/bin/env bash
# The whole story on the handwritten digits: a flow model, the flow map it is at once, what training
# makes of it, a table and two pictures. Every line is a command to use on its own; what was already
# trained is not trained again.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh ".[digits,report]"

dmf train --config=configs/digits_sit.py --workdir=runs/digits_sit
dmf evaluate --checkpoint=runs/digits_sit --steps=1,2,4,8,32

# The same parameters, the last blocks told the time they go to.
dmf evaluate --checkpoint=runs/digits_sit --steps=1,2,4 --output=runs/untrained.json \
  --config.model.conditioning=decoupled --config.model.split_depth=4

dmf train --config=configs/digits_dmf.py --workdir=runs/digits_dmf
dmf evaluate --checkpoint=runs/digits_dmf --steps=1,2,4

dmf sample --checkpoint=runs/digits_dmf --steps=1 --count=60 --output=runs/report/samples.png
dmf report --output=runs/report \
  "flow model=runs/digits_sit/evaluation.json" \
  "flow map, untrained=runs/untrained.json" \
  "flow map, trained=runs/digits_dmf/evaluation.json"
echo "pictures: runs/report/samples.png and runs/report/distance.png"
