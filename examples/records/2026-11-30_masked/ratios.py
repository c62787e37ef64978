"""ratios.py ROWS: final losses of the default with the masked update over those with the update of 0.1, seed by seed."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

NEW, OLD = "masked_blended_nesterov", "blended_nesterov"
losses: defaultdict[str, dict[tuple[str, int], float]] = defaultdict(dict)
for line in Path(sys.argv[1]).read_text().splitlines():
    row = json.loads(line)
    losses[row["name"]][row["update"], row["seed"]] = statistics.mean(row["losses"][-5:])
of_all = []
for name, of_task in losses.items():
    seeds = sorted(seed for update, seed in of_task if update == NEW)
    ratios = [100 * math.log(of_task[NEW, seed] / of_task[OLD, seed]) for seed in seeds]
    of_all += ratios[:3]
    means = (statistics.mean(of_task[update, seed] for seed in seeds) for update in (OLD, NEW))
    print(name, *(f"{mean:.4g}" for mean in means), *(f"{ratio:+.1f}" for ratio in ratios))
print(f"median {statistics.median(of_all):+.2f} %, {min(of_all):+.1f} to {max(of_all):+.1f} %, {len(of_all)} pairs")
