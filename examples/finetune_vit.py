"""Fine-tune a network for images on several workers that synchronise only now and then, in four ways.

    python examples/finetune_vit.py                                            # scikit-learn's digits
    python examples/finetune_vit.py --data IMAGES            # a folder train/CLASS/*.png, or a data set of `datasets`
    python examples/finetune_vit.py --dataset fashion_mnist --data FOLDER      # torchvision's files
    python examples/finetune_vit.py --data IMAGES --model timm:vit_tiny_patch16_224  # or hf:NAME, torchvision:NAME
    torchrun --nproc-per-node 4 examples/finetune_vit.py

Without --model, phase 1 pre-trains a small vision transformer on half of the classes (or loads one: --init). Phase 2
gives the network a new head and fine-tunes it on all classes, once per method: the same weights, data, local optimizer
and learning rate. NAME may also be a folder: hf:FOLDER, timm:local-dir:FOLDER. Every worker runs this script from top
to bottom; the first `fit` starts the others, unless torchrun or SLURM has.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from report import BRIEF, NUM_WORKERS, Curve, CurveRecorder, need, print_once, reading, report, save_once, set_up
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics import Accuracy
from torchvision.datasets import CIFAR10, FashionMNIST
from torchvision.models import VisionTransformer, get_model, get_model_weights
from torchvision.transforms import v2

from lightning_lopt import DiLoCo, LearnedLocalSGD, LocalSGD, RoundMonitor, SlowMo
from lightning_lopt.costs import count

BATCH_SIZE = 32  # per worker
EVAL_IMAGES = 1024  # of the training and of the validation images, after every round


def load_images(dataset: str | None, source: str | None, size: int) -> list[TensorDataset]:
    """Training and validation images, uint8 [N, 3, size, size], with their labels; those of `datasets` are resized."""
    to_image: Callable[[Any], Tensor] = v2.functional.to_image
    if source is None:
        pixels, labels = load_digits(return_X_y=True)
        pairs = list(zip((torch.tensor(pixels) * 255 / 16).byte().view(-1, 8, 8), labels, strict=True))
        splits = [pairs[360:], pairs[:360]]
    elif dataset is not None:
        kind = {"fashion_mnist": FashionMNIST, "cifar10": CIFAR10}[dataset]
        splits = [kind(source, train=train, download=True) for train in (True, False)]
    else:
        from datasets import ClassLabel, Image, load_dataset

        to_image = v2.Compose([v2.RGB(), v2.Resize((size, size)), v2.ToImage()])
        data = load_dataset(source)
        columns = data["train"].features.items()
        image = next((name for name, column in columns if isinstance(column, Image)), None)
        label = next((name for name, column in columns if isinstance(column, ClassLabel) or name == "label"), None)
        if image is None or label is None:
            raise ValueError(f"there are no columns of images and labels, but {[*data['train'].features]}")
        if len(data) == 1:
            data = data["train"].train_test_split(test_size=0.1, seed=0)
        held_out = "test" if "test" in data else "validation"
        splits = [zip(data[name][image], data[name][label], strict=True) for name in ("train", held_out)]
    datasets = []
    for split in splits:
        images, labels = zip(*((to_image(image), int(label)) for image, label in split), strict=True)
        datasets.append(TensorDataset(torch.stack(images).expand(-1, 3, -1, -1), torch.tensor(labels)))
    return datasets


def build_backbone(model: str | None, image_size: int) -> tuple[nn.Module, int, nn.Module]:
    """A network without its last layer, its number of features, and a module that turns images into its input."""
    kind, _, name = (model or "").partition(":")
    network: Any
    mean, std = [0.5], [0.5]
    if kind == "timm":
        import timm

        network = timm.create_model(name, pretrained=True)
        config = network.pretrained_cfg
        image_size, mean, std = config["input_size"][-1], config["mean"], config["std"]
    elif kind == "hf":
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        network = AutoModelForImageClassification.from_pretrained(name).float()
        processor = AutoImageProcessor.from_pretrained(name)
        image_size = processor.size.get("height") or processor.size.get("shortest_edge")
        mean, std = processor.image_mean, processor.image_std
    elif kind == "torchvision":
        weights = get_model_weights(name)["DEFAULT"]
        network, transforms = get_model(name, weights=weights), weights.transforms()
        image_size, mean, std = transforms.crop_size[0], transforms.mean, transforms.std
    else:
        network = VisionTransformer(image_size, image_size // 4, 4, 4, hidden_dim=64, mlp_dim=128)
    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("the network has no linear layer at its end")
    last, head = linear[-1]
    network.set_submodule(last, nn.Identity())
    scale = v2.ToDtype(torch.float32, scale=True)
    return network, head.in_features, v2.Compose([v2.Resize((image_size,) * 2), scale, v2.Normalize(mean, std)])


class Classifier(L.LightningModule):
    """A copy of a backbone, with a new head."""

    def __init__(
        self, backbone: nn.Module, num_features: int, preprocess: nn.Module, num_classes: int, lr: float
    ) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.backbone = copy.deepcopy(backbone).train()
        self.head = nn.Linear(num_features, num_classes)
        self.lr = lr
        self.accuracy = Accuracy("multiclass", num_classes=num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(self.preprocess(images))
        return self.head(getattr(features, "logits", features))  # transformers names its output

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


def fit(strategy: LocalSGD, model: Classifier, splits: list[TensorDataset], args: argparse.Namespace) -> Curve:
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
    parser.add_argument("--dataset", choices=["fashion_mnist", "cifar10"], help="read --data by torchvision")
    parser.add_argument("--data", help="folder of images or of a data set, or a name for `datasets`")
    parser.add_argument("--model", help="pretrained network: timm:NAME, hf:NAME or torchvision:NAME")
    parser.add_argument("--init", type=Path, help="fine-tune the backbone in this file, which phase 1 has saved")
    parser.add_argument("--workers", type=count, default=NUM_WORKERS, help="worker processes (default: %(default)s)")
    args = set_up(parser, steps=256, lr=0.1, pretrained_lr=0.01)
    if args.dataset is not None and args.data is None:
        parser.error("--dataset needs --data FOLDER; torchvision downloads what is not there.")
    if args.model is not None:
        packages = {"timm": "timm", "hf": "transformers", "torchvision": "torchvision"}
        if args.model.partition(":")[0] not in packages:
            parser.error(f"--model must be timm:NAME, hf:NAME or torchvision:NAME, not {args.model}.")
        need(packages[args.model.partition(":")[0]])
    images = f"torchvision's files of {args.dataset}" if args.dataset else "train/CLASS/*.png, or a name for `datasets`"
    with reading("--data", args.data, f"a folder of {images}"):
        splits = load_images(args.dataset, args.data, size=32 if args.model is None else 224)
    num_classes = int(splits[0].tensors[1].max()) + 1
    with reading("--model", args.model, "the name or folder of a pre-trained network that ends in a linear layer"):
        backbone, num_features, preprocess = build_backbone(args.model, splits[0].tensors[0].shape[-1])
    if args.init is not None:
        with reading("--init", args.init, "the backbone of such a network, as phase 1 saves it"):
            backbone.load_state_dict(torch.load(args.init, weights_only=True))
    elif args.model is None:
        print_once("\nPhase 1: pre-training on half of the classes")
        half = [TensorDataset(*(t[s.tensors[1] < num_classes // 2] for t in s.tensors)) for s in splits]
        model = Classifier(backbone, num_features, preprocess, num_classes, args.lr)
        fit(LocalSGD(local_steps=args.local_steps), model, half, args)
        backbone = model.backbone
        save_once(backbone.state_dict(), args.out / "vit_backbone.pt")
    curves = {}
    for method in (LocalSGD, SlowMo, DiLoCo, LearnedLocalSGD):
        print_once(f"\nPhase 2: fine-tuning with {method.__name__}")
        L.seed_everything(args.seed, verbose=False)
        model = Classifier(backbone, num_features, preprocess, num_classes, args.lr)
        curves[method.__name__] = fit(method(local_steps=args.local_steps), model, splits, args)
    report(curves, ["train loss", "val accuracy"], args.out / "finetune_vit.png")


if __name__ == "__main__":
    main()
