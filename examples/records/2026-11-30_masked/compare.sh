#!/usr/bin/env bash
# compare.sh DATA OUT [NAME ...]
# Runs the bundled default with the update of 0.1 and with the present one on every task of the default's record (or on
# those named), at the settings of that record and from its seeds, or those in SEEDS. DATA holds the images and texts;
# rows are appended to OUT/rows.jsonl.
set -euo pipefail
data=$1 out=$2
shift 2
names=" $* "
root="$(cd "$(dirname "$0")/../../.." && pwd)" record="$(cd "$(dirname "$0")/../2026-11-30_default" && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
for update in blended_nesterov masked_blended_nesterov; do
    python - "$out/$update.safetensors" "$update" <<'EOF'
import sys
from lightning_lopt import AdaMLP
network = AdaMLP.bundled()
network.update = sys.argv[2]
network.save(sys.argv[1], overwrite=True)
EOF
done

compare() {
    local name=$1
    shift
    [[ $names =~ ^\ *$ || $names == *" $name "* ]] || return 0
    for update in blended_nesterov masked_blended_nesterov; do
        rm -f "$out/run.jsonl"
        python -m examples.benchmarks run "$out/run.jsonl" "$@" --methods learned --best-of "$record/$name.jsonl" \
            --network "$out/$update.safetensors" --data "$data" --threads 1 --seeds ${SEEDS:-0 1 2}
        sed "s/^{/{\"name\": \"$name\", \"update\": \"$update\", /" "$out/run.jsonl" >>"$out/rows.jsonl"
    done
}

paper="--task fashion_mnist --num-workers 8"
adamw="--local-optimizer adamw --decay --num-workers 4 --local-steps 8"
compare fashion_mnist     $paper --local-steps 4 --rounds 100
compare fashion_mnist_h8  $paper --local-steps 8 --rounds 60
compare fashion_mnist_h16 $paper --local-steps 16 --rounds 40
compare cifar10_conv      --task cifar10_conv --num-workers 4 --local-steps 8 --rounds 60
compare cifar10_vit       --task cifar10_vit $adamw --rounds 50
compare novels_lm         --task novels_lm $adamw --rounds 50
compare characters        --task characters --num-workers 8 --local-steps 4 --rounds 200
compare characters_adamw  --task characters $adamw --rounds 100
compare digits_clients    --task digits --clients 50 --num-workers 8 --local-steps 4 --rounds 150
compare digits_k16_h32    --task digits --num-workers 16 --local-steps 32 --rounds 60
compare digits            --task digits --num-workers 8 --local-steps 4 --rounds 200
