"""Fine-tune a vision transformer on several workers that synchronise only now and then, in four ways.

    python examples/finetune_vit.py                                            # scikit-learn's digits
    python examples/finetune_vit.py --dataset fashion_mnist --data FOLDER      # torchvision's files
    python examples/finetune_vit.py --dataset cifar10 --data FOLDER            # parquet, or torchvision's files
    torchrun --nproc-per-node 4 examples/finetune_vit.py

Phase 1 pre-trains a small network on half of the classes (or loads one: --init, --weights). Phase 2 gives it a new
head and fine-tunes it on all classes, once per method: the same weights, data, local optimizer and learning rate.
Every worker runs this script from top to bottom; the first `fit` starts the others, unless torchrun or SLURM has.
"""

import argparse
import copy
from pathlib import Path

import lightning as L
import torch
from report import BRIEF, NUM_WORKERS, Curve, CurveRecorder, print_once, report, save_once, set_up
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics import Accuracy
from torchvision.datasets import CIFAR10, FashionMNIST
from torchvision.models import VisionTransformer, get_model, get_model_weights
from torchvision.transforms import v2

from lightning_lopt import DiLoCo, LearnedLocalSGD, LocalSGD, RoundMonitor, SlowMo

BATCH_SIZE = 32  # per worker
EVAL_IMAGES = 1024  # of the training and of the validation images, after every round


def load_images(dataset: str, folder: Path | None) -> list[TensorDataset]:
    """Training and validation images, uint8 [N, 3, size, size], with their labels."""
    if folder is None:
        pixels, labels = load_digits(return_X_y=True)
        pairs = list(zip((torch.tensor(pixels) * 255 / 16).byte().view(-1, 8, 8), labels, strict=True))
        splits = [pairs[360:], pairs[:360]]
    elif any(folder.glob("*.parquet")):
        from datasets import load_dataset

        files = {split: str(folder / f"{split}-*.parquet") for split in ("train", "test")}
        data = load_dataset("parquet", data_files=files).values()
        splits = [zip(split["img"], split["label"], strict=True) for split in data]
    else:
        kind = {"fashion_mnist": FashionMNIST, "cifar10": CIFAR10}[dataset]
        splits = [kind(folder, train=train, download=True) for train in (True, False)]
    datasets = []
    for split in splits:
        images, labels = zip(*((v2.functional.to_image(image), int(label)) for image, label in split), strict=True)
        datasets.append(TensorDataset(torch.stack(images).expand(-1, 3, -1, -1), torch.tensor(labels)))
    return datasets


def build_backbone(weights: str | None, image_size: int) -> tuple[VisionTransformer, nn.Module]:
    """A vision transformer without its head, and what turns images into its input."""
    if weights is not None:
        pretrained = get_model_weights(weights)["DEFAULT"]
        backbone, preprocess = get_model(weights, weights=pretrained), pretrained.transforms()
    else:
        backbone = VisionTransformer(image_size, image_size // 4, 4, 4, hidden_dim=64, mlp_dim=128)
        preprocess = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])])
    assert isinstance(backbone, VisionTransformer), f"{weights} is not a vision transformer."
    backbone.heads = nn.Sequential()
    return backbone, preprocess


class ViTClassifier(L.LightningModule):
    """A copy of a backbone, with a new head."""

    def __init__(self, backbone: VisionTransformer, preprocess: nn.Module, num_classes: int, lr: float) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.backbone = copy.deepcopy(backbone)
        self.head = nn.Linear(backbone.hidden_dim, num_classes)
        self.lr = lr
        self.accuracy = Accuracy("multiclass", num_classes=num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(self.preprocess(images)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int) -> None:
        logits, labels = self(batch[0]), batch[1]
        if dataloader_idx == 0:
            loss = nn.functional.cross_entropy(logits, labels)
            self.log("train loss", loss, prog_bar=True, sync_dist=True, add_dataloader_idx=False)
        else:
            self.accuracy(logits, labels)
            self.log("val accuracy", self.accuracy, prog_bar=True, add_dataloader_idx=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(strategy: LocalSGD, model: ViTClassifier, splits: list[TensorDataset], args: argparse.Namespace) -> Curve:
    """Train for one long epoch; validate the global weights after every round."""
    draws = torch.randint(len(splits[0]), (args.steps * args.workers * BATCH_SIZE,))  # the same on all workers
    train = DataLoader(Subset(splits[0], draws.tolist()), BATCH_SIZE)  # the Trainer gives each its share
    evaluate = [DataLoader(Subset(split, range(min(EVAL_IMAGES, len(split)))), 256) for split in splits]
    recorder = CurveRecorder()
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cuda" if torch.cuda.device_count() >= args.workers else "cpu",
        devices=args.workers,
        max_epochs=1,
        val_check_interval=args.local_steps,
        callbacks=[RoundMonitor(), recorder],
        **BRIEF,
    )
    trainer.fit(model, train, evaluate)
    return recorder.curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["digits", "fashion_mnist", "cifar10"], default="digits")
    parser.add_argument("--data", type=Path, help="folder of the data set; torchvision downloads what is not there")
    parser.add_argument("--weights", help="fine-tune torchvision's pretrained network of this name, e.g. vit_b_16")
    parser.add_argument("--init", type=Path, help="fine-tune the backbone in this file, which phase 1 has saved")
    parser.add_argument("--workers", type=int, default=NUM_WORKERS, help="worker processes (default: %(default)s)")
    args = set_up(parser, steps=256, lr=0.1)
    if (args.dataset == "digits") != (args.data is None):
        parser.error("fashion_mnist and cifar10 need both --dataset and --data FOLDER; digits need neither.")
    splits = load_images(args.dataset, args.data)
    num_classes = int(splits[0].tensors[1].max()) + 1
    backbone, preprocess = build_backbone(args.weights, splits[0].tensors[0].shape[-1])
    if args.init is not None:
        backbone.load_state_dict(torch.load(args.init, weights_only=True))
    elif args.weights is None:
        print_once("\nPhase 1: pre-training on half of the classes")
        half = [TensorDataset(*(t[s.tensors[1] < num_classes // 2] for t in s.tensors)) for s in splits]
        model = ViTClassifier(backbone, preprocess, num_classes, args.lr)
        fit(LocalSGD(local_steps=args.local_steps), model, half, args)
        backbone = model.backbone
        save_once(backbone.state_dict(), args.out / "vit_backbone.pt")
    curves = {}
    for method in (LocalSGD, SlowMo, DiLoCo, LearnedLocalSGD):
        print_once(f"\nPhase 2: fine-tuning with {method.__name__}")
        L.seed_everything(args.seed, verbose=False)
        model = ViTClassifier(backbone, preprocess, num_classes, args.lr)
        curves[method.__name__] = fit(method(local_steps=args.local_steps), model, splits, args)
    report(curves, ["train loss", "val accuracy"], args.out / "finetune_vit.png")


if __name__ == "__main__":
    main()
