"""The README's first command with other seeds, threads and instruction sets; a line with the curves of each run goes to a file.

for seed in 0 1 2 3 4; do for threads in 1 2; do for isa in default avx512; do
  OMP_NUM_THREADS=$threads ATEN_CPU_CAPABILITY=$isa CURVES=curves.jsonl PYTHONPATH=examples \
    python examples/records/2026-12-01_first_command/run.py --seed $seed --out /tmp/first
done; done; done
python examples/records/2026-12-01_first_command/run.py --summary curves.jsonl
"""

import json
import os
import statistics
import sys
from collections import defaultdict

import finetune_vit
import torch
from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def keep(curves, metrics, file):
    run = {
        "seed": int(sys.argv[sys.argv.index("--seed") + 1]),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }
    for name, curve in curves.items():
        run[name] = {metric: [float(f"{point[metric]:.5g}") for point in curve] for metric in metrics}
    with open(os.environ["CURVES"], "a") as out:
        out.write(json.dumps(run) + "\n")


def summary(path):
    runs = [json.loads(line) for line in open(path)]
    final = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for kind in ("all", f"{run['threads']} threads", run["isa"]):
            for name in ("LocalSGD", "SlowMo", "DiLoCo", "LearnedLocalSGD"):
                losses, accuracies = run[name].values()
                jump = max(b / a for a, b in zip(losses, losses[1:]))
                final[kind, name]["loss"].append(losses[-1])
                final[kind, name]["accuracy"].append(accuracies[-1])
                final[kind, name]["largest ratio of a round's loss to that before"].append(jump)
    for (kind, name), values in final.items():
        text = ", ".join(f"{key} {statistics.fmean(v):.4f} ({min(v):.4f} to {max(v):.4f})" for key, v in values.items())
        print(f"{kind} ({len(values['loss'])} runs), {name}: {text}")
    behind = [
        (run["seed"], run["threads"], run["isa"], name, metric)
        for run in runs
        for name in ("LocalSGD", "SlowMo", "DiLoCo")
        for metric, sign in (("train loss", 1), ("val accuracy", -1))
        if sign * run["LearnedLocalSGD"][metric][-1] > sign * run[name][metric][-1]
    ]
    print(f"runs in which LearnedLocalSGD is behind: {behind}")


if __name__ == "__main__":
    if sys.argv[1] == "--summary":
        summary(sys.argv[2])
    else:
        finetune_vit.report = keep
        finetune_vit.main()
