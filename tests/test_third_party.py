"""Models and LightningModules written by others, unchanged, under LearnedLocalSGD on two processes."""

from __future__ import annotations

import hashlib
import traceback

import lightning.pytorch as pl
import pytest
import timm
import torch
import torchvision
import transformers
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import detection

from lightning_lopt import LearnedLocalSGD
from tests.processes import run_workers
from tests.strategies.support import flat, trainer

LOCAL_STEPS, NUM_WORKERS, BATCH = 5, 2, 4
IMAGE_SIZE, CLASSES, VOCABULARY, LENGTH = 32, 4, 40, 12


class Wrapper(pl.LightningModule):
    """The usual ten lines around somebody's model."""

    def __init__(self, model: nn.Module, loss, lr: float = 1e-3) -> None:
        super().__init__()
        self.model, self.loss, self.lr = model, loss, lr

    def training_step(self, batch, batch_idx):
        return self.loss(self.model, batch)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


def _classify(model, batch):
    return nn.functional.cross_entropy(model(batch["image"]), batch["label"])


def _segment(model, batch):
    return nn.functional.cross_entropy(model(batch["image"])["out"], batch["mask"])


def _detect(model, batch):
    targets = [{"boxes": box.unsqueeze(0), "labels": torch.ones(1, dtype=torch.long)} for box in batch["box"]]
    return sum(model(list(batch["image"]), targets).values())


def _language(model, batch):
    return model(input_ids=batch["tokens"], labels=batch["tokens"]).loss


def _speech(model, batch):
    return model(input_features=batch["mel"], labels=batch["tokens"]).loss


class _Transformer(LightningTransformer):
    def prepare_data(self):
        """Nothing to download: the test brings its data."""


class _LSTM(LightningLSTM):
    def prepare_data(self):
        """As above."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)  # its own 20 is meant for batches of 20 × 35 words


def _resnet():
    block = torchvision.models.resnet.BasicBlock
    return Wrapper(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=CLASSES), _classify)


def _vit():
    vit = torchvision.models.VisionTransformer(IMAGE_SIZE, 8, 2, 2, 32, 64, num_classes=CLASSES)
    return Wrapper(vit, _classify)


def _detection():
    backbone = torchvision.models.mobilenet_v3_small(weights=None).features
    backbone.out_channels = 576
    model = detection.FasterRCNN(
        backbone,
        min_size=64,
        rpn_anchor_generator=detection.rpn.AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=2),
        box_head=detection.faster_rcnn.TwoMLPHead(576 * 9, 64),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(64, num_classes=2),
    )
    return Wrapper(model, _detect)


def _segmentation():
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    )
    return Wrapper(model, _segment)


def _gpt2():
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return Wrapper(transformers.GPT2LMHeadModel(config), _language)


def _bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return Wrapper(transformers.BertForMaskedLM(config), _language)


def _t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return Wrapper(transformers.T5ForConditionalGeneration(config), _language)


def _whisper():
    layers = dict.fromkeys(
        ("encoder_layers", "encoder_attention_heads", "decoder_layers", "decoder_attention_heads"), 2
    )
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"num_mel_bins": 8, "d_model": 32, "max_source_positions": 16, "max_target_positions": 16}
    config = transformers.WhisperConfig(**layers, **tokens, **sizes, decoder_start_token_id=1)
    return Wrapper(transformers.WhisperForConditionalGeneration(config), _speech)


def _timm_convnet():
    return Wrapper(timm.create_model("mobilenetv3_small_050", num_classes=CLASSES), _classify)


def _timm_vit():
    model = timm.create_model("vit_tiny_patch16_224", img_size=IMAGE_SIZE, depth=2, num_classes=CLASSES)
    return Wrapper(model, _classify)


def _pairs(batch):
    return batch["tokens"][:, :-1], batch["tokens"][:, 1:].contiguous()


CASES = {
    "torchvision ResNet-10": (_resnet, None),
    "torchvision ViT": (_vit, None),
    "torchvision Faster R-CNN (detection)": (_detection, None),
    "torchvision LR-ASPP (segmentation)": (_segmentation, None),
    "transformers GPT-2": (_gpt2, None),
    "transformers BERT": (_bert, None),
    "transformers T5": (_t5, None),
    "transformers Whisper (audio)": (_whisper, None),
    "timm MobileNetV3": (_timm_convnet, None),
    "timm ViT": (_timm_vit, None),
    "Lightning demo: BoringModel": (BoringModel, lambda batch: batch["vector"]),
    "Lightning demo: transformer": (lambda: _Transformer(VOCABULARY), _pairs),
    "Lightning demo: LSTM": (lambda: _LSTM(VOCABULARY), _pairs),
}


def _rows(rank: int) -> list[dict[str, torch.Tensor]]:
    """The same batch again and again, another on each worker, so that a loss can fall in a few steps."""
    generator = torch.Generator().manual_seed(rank)
    rows = []
    for i in range(BATCH):
        label = i % CLASSES
        row = {
            "image": torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) / 4 + label,
            "label": torch.tensor(label),
            "mask": torch.full((IMAGE_SIZE, IMAGE_SIZE), label),
            "box": torch.tensor([4.0, 4.0, 20.0, 24.0]),
            "tokens": torch.randint(3, VOCABULARY, (LENGTH,), generator=generator),
            "mel": torch.randn(8, 32, generator=generator),
            "vector": torch.randn(32, generator=generator),
        }
        rows.append(row)
    return rows * (2 * LOCAL_STEPS)


class _Losses(pl.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def _train(rank: int, make, convert):
    torch.manual_seed(0)
    module, losses = make(), _Losses()

    def collate(rows):
        batch = torch.utils.data.default_collate(rows)
        return batch if convert is None else convert(batch)

    data = DataLoader(_rows(rank), BATCH, collate_fn=collate)
    strategy = LearnedLocalSGD(LOCAL_STEPS)
    run = trainer(strategy, NUM_WORKERS, max_epochs=1, callbacks=[losses], use_distributed_sampler=False)
    run.fit(module, data)
    return losses.values, strategy.rounds.round_idx, hashlib.sha256(flat(module).numpy()).hexdigest()


def _all(rank: int):
    results = {}
    try:
        for name, (make, convert) in CASES.items():
            results[name] = _train(rank, make, convert)
    except Exception:
        results[name] = traceback.format_exc()  # the last one: the other worker may be waiting
    return results


@pytest.fixture(scope="module")
def results():
    return run_workers(_all, NUM_WORKERS, connect=False, limit=240)


@pytest.mark.parametrize("name", CASES)
def test_models_of_others_train_unchanged(name, results):
    assert name in results[0], "a case before this one failed"
    for result in results:
        assert not isinstance(result[name], str), result[name]
    (losses, rounds, weights), (others, _, other_weights) = (result[name] for result in results)
    assert rounds == 2
    assert len(losses) == 2 * LOCAL_STEPS
    assert weights == other_weights
    assert sum(losses[-2:] + others[-2:]) < sum(losses[:2] + others[:2])
