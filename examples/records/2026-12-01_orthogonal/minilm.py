"""Fine-tune MiniLM with other polynomials: minilm.py MODEL DATA SET K H SEED ...

PYTHONPATH=.:examples:examples/records/2026-12-01_orthogonal python examples/records/2026-12-01_orthogonal/minilm.py MODEL DATA "two, .05" 4 16 0 1
"""

import sys
from pathlib import Path

import torch
from orthogonal import SETS, use

from examples.benchmarks.compare.finetune import BATCH_SIZE, Run, load_passages

PASSAGES = 4096
model, data, name, num_workers, local_steps, *seeds = sys.argv[1:]
torch.set_num_threads(1)
use(SETS[name])
passages = load_passages(model, Path(data))
for seed in map(int, seeds):
    steps = PASSAGES // (int(num_workers) * BATCH_SIZE)
    run = Run("final", "LearnedLocalSGD", 2e-4, int(num_workers), int(local_steps), steps, seed)
    curve = run.train(model, passages, 64)["curve"]
    print(name, seed, [(point["steps"], point["loss"], point["accuracy"]) for point in curve], flush=True)
