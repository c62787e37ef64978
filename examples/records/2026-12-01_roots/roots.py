"""Compare the blended Nesterov step with its former roots (`roots`), or with blocks along a vocabulary (`words`).

PYTHONPATH=.:examples python examples/records/2026-12-01_roots/roots.py roots FASHION_MNIST CIFAR10 > roots.jsonl
PYTHONPATH=.:examples python examples/records/2026-12-01_roots/roots.py words FOLDER_WITH_TRAIN_TXT > words.jsonl

A line per task and schedule has, for `BlendedNesterov` (base_step) and for the default (learned), the logarithm of the ratio of the final losses,
new to former, of each seed, and the CPU seconds of both.
"""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from lightning_lopt.functional import blended, grams, updates, whitening
from lightning_lopt.meta import Evaluation, LocalOptimizer, LocalTraining
from lightning_lopt.meta.outer import base_step, learned_step
from lightning_lopt.network import AdaMLP

NETWORK = AdaMLP.bundled()
OUTER = {"base_step": base_step, "learned": lambda anchor: learned_step(anchor, [NETWORK])}
BASE_FORMS = blended.base_forms


def use_roots(former):
    """Both steps take their roots from here on with the former polynomials, or the new ones."""
    roots = blended.Roots(whitened=whitening.FORMER_POLYNOMIALS if former else whitening.POLYNOMIALS)
    blended.base_forms = lambda step, state, factors, like, _=None: BASE_FORMS(step, state, factors, like, roots)
    updates.base_forms = blended.base_forms


def use_blocks(former):
    """Both steps keep blocks along sides of any length from here on, or diagonals of the long ones."""
    grams.LONG = 1 << 40 if former else 4096
    grams.gram_shapes.cache_clear()


def compare(evaluation, use, **names):
    row = dict(names)
    for name, outer in OUTER.items():
        finals = []
        for former in (True, False):
            use(former)
            start = time.process_time()
            finals.append(evaluation.finals(evaluation.losses_with(outer)))
            row[f"{name}, {'former' if former else 'new'} s"] = round(time.process_time() - start, 2)
        row[name] = (finals[1] / finals[0]).log().tolist()
    print(json.dumps(row), flush=True)


def roots(folders):
    from meta_train import load_images
    from recipes import controller_tasks

    for i, (task, training) in enumerate(controller_tasks([load_images(Path(each)) for each in folders])):
        low, high = training.local_lr if isinstance(training.local_lr, tuple) else (training.local_lr,) * 2
        for kind, share in (("constant", 0.0), ("decaying", 1.0)):
            fixed = replace(training, local_lr=math.sqrt(low * high), decay_share=share)
            evaluation = Evaluation(f"{kind} {i}", task, fixed, num_rounds=50, num_runs=6, seed=77)
            compare(evaluation, use_roots, task=i, kind=kind, optimizer=training.optimizer.kind)


def words(folders):
    from examples.benchmarks.compare import data, objectives

    text = data._text("novels_words", Path(folders[0]))
    task = objectives.next_word(data._words(text, 8000), 8000, 48, 64, "words")  # embeddings 8000 x 48, head 48 x 8000
    for optimizer, local_lr, num_workers, local_steps in (("sgd", 1.0, 4, 8), ("adamw", 0.01, 4, 8)):
        for share in (0.0, 1.0):
            training = LocalTraining(num_workers, local_steps, local_lr, share, LocalOptimizer(optimizer))
            evaluation = Evaluation("words", task, training, num_rounds=30, num_runs=3, seed=5)
            compare(evaluation, use_blocks, optimizer=optimizer, decaying=bool(share))


torch.set_num_threads(1)
{"roots": roots, "words": words}[sys.argv[1]](sys.argv[2:])
