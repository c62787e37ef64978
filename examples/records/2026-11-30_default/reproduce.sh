#!/usr/bin/env bash
# reproduce.sh DATA OUT [NAME ...]
# Tunes the baselines of every task (or of those named), then runs their best settings, the bundled default and the step
# that it starts from on fresh seeds, and prints the tables. DATA holds the images and texts. Hours on two cores.
set -euo pipefail
data=$1 out=$2
shift 2
names=" $* "
export PYTHONPATH="$(cd "$(dirname "$0")/../../.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
bench="python -m examples.benchmarks"
mkdir -p "$out"
python -c 'import sys; from lightning_lopt import AdaMLP; AdaMLP.base_step(seed=0).save(sys.argv[1], True)' "$out/base_step.safetensors"

compare() {
    local name=$1 methods="local_sgd slowmo diloco fedadam"
    shift
    [[ $names =~ ^\ *$ || $names == *" $name "* ]] || return 0
    local tuning=()
    while [[ $1 != -- ]]; do tuning+=("$1"); shift; done
    shift
    rm -f "$out/$name.jsonl" "$out/base_step_$name.jsonl"
    $bench tune "$out/$name.jsonl" "$@" "${tuning[@]}" --methods $methods --data "$data" --threads 1
    $bench run "$out/base_step_$name.jsonl" "$@" --methods learned --network "$out/base_step.safetensors" \
        --best-of "$out/$name.jsonl" --data "$data" --threads 1
}

paper="--task fashion_mnist --num-workers 8"
adamw="--local-optimizer adamw --decay --num-workers 4 --local-steps 8"
compare fashion_mnist     --local-lr 0.5 -- $paper --local-steps 4 --rounds 100
compare fashion_mnist_h8  --local-lr 0.5 --keep 8 -- $paper --local-steps 8 --rounds 60
compare fashion_mnist_h16 --local-lr 0.5 --keep 8 -- $paper --local-steps 16 --rounds 40
compare cifar10_conv      --local-lr 0.1 --keep 8 -- --task cifar10_conv --num-workers 4 --local-steps 8 --rounds 60
compare cifar10_vit       --local-lr 0.003 --keep 6 --share 0.2 -- --task cifar10_vit $adamw --rounds 50
compare novels_lm         --local-lr 0.003 --keep 6 --share 0.2 -- --task novels_lm $adamw --rounds 50
compare characters        -- --task characters --num-workers 8 --local-steps 4 --rounds 200
compare characters_adamw  --local-lr 0.01 0.003 0.001 -- --task characters $adamw --rounds 100
compare digits_clients    --local-lr 1 0.5 0.1 -- --task digits --clients 50 --num-workers 8 --local-steps 4 --rounds 150
compare digits_k16_h32    --local-lr 0.5 0.1 -- --task digits --num-workers 16 --local-steps 32 --rounds 60
compare digits            -- --task digits --num-workers 8 --local-steps 4 --rounds 200
