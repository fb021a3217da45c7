#!/bin/sh
# Makes the bundled tiny base model again, in DIR: about 25 minutes on two cores.
# usage: models/make.sh DIR   (TUNESMITH names the binary; default: tunesmith)
set -eu
dir=$1
tunesmith=${TUNESMITH:-tunesmith}

"$tunesmith" bundle --output "$dir"

# stage MODEL NAME FLAGS...: trains all weights of DIR/MODEL, publishes DIR/NAME.
stage() {
    model=$1 name=$2
    shift 2
    "$tunesmith" train --method full --model "$dir/$model" --output "$dir/$name" \
        --seed 42 --beta1 0.9 --beta2 0.95 --grad-clip 1 --weight-decay 0 "$@"
}

# Copies first: nothing else is learned before a model can copy, and it forms fastest on its own.
stage tiny-kitchen-untrained copy \
    --data "$dir/corpus/copy.jsonl" --valid "$dir/corpus/copy-valid.jsonl" --dtype f32 \
    --max-steps 300 --batch-size 96 --micro-batch-tokens 1700 --max-length 320 \
    --lr 3e-3 --schedule constant --warmup-steps 50
stage copy mix \
    --data "$dir/corpus/mix.jsonl" --valid "$dir/corpus/kitchen-valid.jsonl" --dtype f32 \
    --max-steps 1400 --batch-size 24 --micro-batch-tokens 1600 --max-length 400 \
    --lr 2.5e-3 --schedule linear --warmup-steps 30
stage mix tiny-kitchen \
    --data "$dir/corpus/kitchen.jsonl" --valid "$dir/corpus/kitchen-valid.jsonl" --dtype bf16 \
    --epochs 1 --batch-size 24 --micro-batch-tokens 1600 --max-length 400 \
    --lr 1.5e-3 --schedule cosine --warmup-steps 10

cp "$dir/tiny-kitchen-untrained/generation_config.json" "$dir/tiny-kitchen/"
