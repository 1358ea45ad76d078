#!/usr/bin/env bash
# Trains the demo's dense model from nothing (about 35 minutes on 2 cores) and puts it in assets/shapes-nlvr.
set -euo pipefail
cd "$(dirname "$0")/.."
upop data shapes --task nlvr --out output/shapes/nlvr --seed 0 --size 60000
python assets/pretrain_shapes.py --config configs/shapes/nlvr.yaml --output-dir output/shapes-pretrained
upop train nlvr --config configs/shapes/nlvr.yaml --pretrained output/shapes-pretrained --output-dir output/shapes-dense \
  --epoch 8 --set init_lr=5.0e-4
rm -rf assets/shapes-nlvr
cp -r output/shapes-dense/best assets/shapes-nlvr
