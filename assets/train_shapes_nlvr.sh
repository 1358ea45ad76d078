#!/usr/bin/env bash
# Trains the demo's dense model from nothing (about half an hour on 2 cores) and puts it in src/upop/assets/shapes-nlvr.
set -euo pipefail
cd "$(dirname "$0")/.."
data=output/shapes/nlvr-160k
upop data shapes --task nlvr --out $data --seed 0 --size 160000
python assets/pretrain_shapes.py --config configs/shapes/nlvr.yaml --tokenizer $data/tokenizer \
  --output-dir output/shapes-pretrained
upop train nlvr --config configs/shapes/nlvr.yaml --pretrained output/shapes-pretrained --output-dir output/shapes-dense \
  --epochs 2 --set init_lr=5.0e-4 --set warmup_steps=100 --set image_root=$data/images/NLVR2 \
  --set ann_root=$data/annotation --set tokenizer=$data/tokenizer
rm -rf src/upop/assets/shapes-nlvr  # assets/shapes-nlvr is a link to it
cp -r output/shapes-dense/best src/upop/assets/shapes-nlvr
