#!/usr/bin/env bash
# reproduce.sh MODEL DATA OUT: runs that OUT/runs.jsonl holds are not repeated
set -eu
finetune() { "${PYTHON:-python}" -m examples.benchmarks finetune "$3/runs.jsonl" --model "$1" --data "$2" --passages 4096 --eval-steps 64 "${@:4}"; }

finetune "$@" --num-workers 2 4
finetune "$@" --num-workers 2 4 --local-steps 16 64
