"""Compare the blended Nesterov step and the default with other polynomials of the orthogonalised form.

PYTHONPATH=.:examples python examples/records/2026-12-01_orthogonal/orthogonal.py FASHION_MNIST CIFAR10 OUT.jsonl [--outer learned]

A line per task of the recipe `controller` and schedule has, for each set of polynomials, the logarithm of the ratio of the
final losses of each seed to those of Muon's five.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from meta_train import load_images
from recipes import controller_tasks

from lightning_lopt.functional import blended, updates
from lightning_lopt.functional.blended import Roots
from lightning_lopt.functional.orthogonal import FORMER_POLYNOMIALS, POLYNOMIALS
from lightning_lopt.meta import Evaluation
from lightning_lopt.meta.outer import base_step, learned_step
from lightning_lopt.network import AdaMLP

BASE_FORMS, NETWORK = blended.base_forms, AdaMLP.bundled()
OUTER = {"base_step": base_step, "learned": lambda anchor: learned_step(anchor, [NETWORK])}
SETS = {  # of such compositions those of least error on singular values from the given one to 1
    "muon5": FORMER_POLYNOMIALS,
    "three, .01": ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)),
    "three, .02": ((7.7110, -22.1138, 16.2487), (3.2153, -2.4112, 0.5013), (2.2183, -1.5940, 0.4107)),
    "two, .05": POLYNOMIALS,
    "two, .1": ((5.6037, -13.8837, 9.7334), (2.1306, -1.5116, 0.4020)),
    "four, .005": (
        (8.2987, -24.4305, 18.0903),
        (3.9152, -2.9211, 0.5592),
        (3.1746, -2.3804, 0.4978),
        (2.1895, -1.5672, 0.4079),
    ),
}


def use(polynomials):
    """Both steps orthogonalise with these from here on."""
    roots = Roots(orthogonal=polynomials)
    blended.base_forms = lambda step, state, factors, like, _=None: BASE_FORMS(step, state, factors, like, roots)
    updates.base_forms = blended.base_forms


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs=2, type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--outer", choices=list(OUTER), default="base_step")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=[name for name in SETS if name != "two, .1"])
    parser.add_argument("--tasks", nargs="+", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for i, (task, training) in enumerate(controller_tasks([load_images(folder) for folder in args.data])):
        if args.tasks and i not in args.tasks:
            continue
        low, high = training.local_lr
        for kind, share in (("constant", 0.0), ("decaying", 1.0)):
            fixed = replace(training, local_lr=math.sqrt(low * high), decay_share=share)
            evaluation = Evaluation(f"{kind} {i}", task, fixed, num_rounds=50, num_runs=4, seed=77)
            finals = {}
            for name in dict.fromkeys(("muon5", *args.sets)):
                use(SETS[name])
                finals[name] = evaluation.finals(evaluation.losses_with(OUTER[args.outer]))
            ratios = {
                name: [round(x, 5) for x in (final / finals["muon5"]).log().tolist()] for name, final in finals.items()
            }
            with args.out.open("a") as file:
                row = {"task": i, "kind": kind, "optimizer": training.optimizer.kind, "outer": args.outer}
                file.write(json.dumps(row | ratios) + "\n")


if __name__ == "__main__":
    main()
