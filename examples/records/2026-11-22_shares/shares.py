"""Ratio of the largest to the mean share of K workers in a sharded outer step."""

from types import SimpleNamespace
from typing import cast

import torch
import torchvision
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_lopt.comm import Communicator
from lightning_lopt.parameters import Tracked
from lightning_lopt.sharding import Shards

with torch.device("meta"):
    models = {
        "ViT-B/16": torchvision.models.vit_b_16(),
        "ResNet-50": torchvision.models.resnet50(),
        "GPT-2": GPT2LMHeadModel(GPT2Config()),
    }
for name, model in models.items():
    line = []
    for num_workers in (2, 4, 8):
        shards = Shards(cast(Communicator, SimpleNamespace(num_workers=num_workers)))
        shards.assign([Tracked(p) for p in model.parameters()])
        line.append(f"K {num_workers}: {max(shards._loads) / sum(shards._loads) * num_workers:.2f}")
    print(name, *line)
