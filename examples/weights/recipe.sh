#!/bin/sh
# How examples/weights/tiny was made: sh examples/weights/recipe.sh FOLDER, from the repository's root.
# Never trained on: the recordings in HELD_OUT of evaluate.py, and all of a103l's copies but one.
set -eu
folder=$1

python examples/weights/corpus.py "$folder/corpus" --seed 0

normwear-fast prepare tests/data/03700181.hea tests/data/a103l.hea tests/data/ppg_datetime.csv \
    "$folder/corpus/imu" --hop 0.5 --workers 0 --output "$folder/shards/real"
normwear-fast prepare "$folder/corpus/simulated" --hop 4 --workers 0 \
    --output "$folder/shards/simulated"

normwear-fast pretrain "$folder/shards" --output "$folder/first" --config small --steps 1500 \
    --batch-size 8 --accumulate 1 --learning-rate 0.032 --warmup 100 --seed 0
normwear-fast pretrain "$folder/shards" --start-from "$folder/first" --output "$folder/second" \
    --steps 1200 --batch-size 8 --accumulate 1 --learning-rate 0.024 --warmup 50 --seed 1

python examples/weights/to_bfloat16.py "$folder/second" examples/weights/tiny
python examples/weights/evaluate.py --weights examples/weights/tiny \
    --output bench/results/example-weights.json
