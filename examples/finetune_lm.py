"""Fine-tune a language model on several workers that synchronise only now and then, in four ways.

    python examples/finetune_lm.py                    # a small GPT, from Python's source code to Python's manual
    python examples/finetune_lm.py --data TEXT        # to a text of yours: a file, or a data set of `datasets`
    python examples/finetune_lm.py --model gpt2       # any causal language model of `transformers`, or a folder of one
    python examples/finetune_lm.py --model gpt2 --lora 8 --lr 3e-4  # low-rank factors alone (`peft`)
    torchrun --nproc-per-node 4 examples/finetune_lm.py

Without --model, phase 1 pre-trains a network of bytes on the source code of Python's standard library (or loads one:
--init). Phase 2 fine-tunes the model on the text, once per method: the same weights, data, local optimizer and cosine
of learning rates. Every worker runs this script from top to bottom; the first `fit` starts the others, unless torchrun
or SLURM has.
"""

import argparse
import copy
import sysconfig
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from report import BRIEF, NUM_WORKERS, Curve, CurveRecorder, need, print_once, reading, report, save_once, set_up
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.text import Perplexity

from lightning_lopt import DiLoCo, LearnedLocalSGD, LocalSGD, RoundMonitor, SlowMo
from lightning_lopt.costs import count

CONTEXT = 64  # bytes or tokens
BATCH_SIZE = 16  # windows per worker
EVAL_WINDOWS = 512  # of the training and of the validation text, after every round
TEXTS = "a text file, or a folder or name for `datasets` with a column `text`"


def load_text(source: str | None) -> str:
    """A text file, a data set with a column `text`, or the manual that comes with Python."""
    if source is None:
        return "".join(topics[name] for name in sorted(topics))
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8")
    from datasets import load_dataset

    return "\n".join(load_dataset(source, split="train")["text"])


def windows(text: str, tokenizer: Callable[[str], Mapping[str, list[int]]] | None = None) -> list[TensorDataset]:
    """Windows of CONTEXT + 1 bytes, or tokens, of the text's first nine tenths, for training, and of the rest."""
    data = torch.tensor(list(text.encode()) if tokenizer is None else tokenizer(text)["input_ids"])
    if len(data) < 10 * (CONTEXT + 2):
        raise ValueError(f"{len(data)} bytes or tokens are too few: the last tenth must hold a window of {CONTEXT + 1}")
    return [TensorDataset(t.unfold(0, CONTEXT + 1, CONTEXT)) for t in data.split(len(data) * 9 // 10 + 1)]


class Block(nn.Module):
    """Causal self-attention and an MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [batch, bytes, width]
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = scaled_dot_product_attention(q, k, v, is_causal=True)  # [batch, heads, bytes, width / heads]
        x = x + self.proj(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(L.LightningModule):
    """Training of a network from tokens [batch, length] to the logits of the next ones."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.perplexity = Perplexity()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int) -> None:
        if dataloader_idx == 0:
            loss = self.training_step(batch, batch_idx)
            self.log("train loss", loss, prog_bar=True, sync_dist=True, add_dataloader_idx=False)
        else:
            self.perplexity(self(batch[0][:, :-1]), batch[0][:, 1:])
            self.log("val perplexity", self.perplexity, prog_bar=True, add_dataloader_idx=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        num_steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class GPT(LanguageModel):
    """A small causal transformer on bytes."""

    def __init__(self, lr: float, width: int = 64, depth: int = 3, num_heads: int = 4) -> None:
        super().__init__(lr)
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 256, bias=False)
        self.embed.weight = self.head.weight  # tied

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(text) + self.position))


class PretrainedLM(LanguageModel):
    """A causal language model of transformers: all of it trains, or low-rank factors of a rank (LoRA)."""

    def __init__(self, name: str, lr: float, lora: int | None) -> None:
        super().__init__(lr)
        from transformers import AutoModelForCausalLM

        self.network = AutoModelForCausalLM.from_pretrained(name).float().train()
        if lora is not None:
            from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

            self.network = get_peft_model(self.network, LoraConfig(task_type="CAUSAL_LM", r=lora))

    def forward(self, text: Tensor) -> Tensor:
        return self.network(input_ids=text).logits


def fit(strategy: LocalSGD, model: LanguageModel, splits: list[TensorDataset], args: argparse.Namespace) -> Curve:
    """Train for one long epoch; validate the global weights after every round."""
    draws = torch.randint(len(splits[0]), (args.steps * args.workers * BATCH_SIZE,))  # the same on all workers
    train = DataLoader(Subset(splits[0], draws.tolist()), BATCH_SIZE)  # the Trainer gives each its share
    evaluate = [DataLoader(Subset(split, range(min(EVAL_WINDOWS, len(split)))), 64) for split in splits]
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


def pretrain(args: argparse.Namespace) -> GPT:
    """Phase 1: a small GPT that knows source code."""
    model = GPT(args.lr)
    if args.init is not None:
        with reading("--init", args.init, "the weights of such a network, as phase 1 saves them"):
            model.load_state_dict(torch.load(args.init, weights_only=True))
        return model
    print_once("\nPhase 1: pre-training on source code")
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = windows("".join(file.read_text(encoding="utf-8") for file in files))
    fit(LocalSGD(local_steps=args.local_steps), model, code, args)
    save_once(model.state_dict(), args.out / "gpt.pt")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help=f"text to fine-tune on: {TEXTS}")
    parser.add_argument("--model", help="name or folder of a causal language model of transformers")
    parser.add_argument("--lora", type=count, metavar="RANK", help="train low-rank factors of the --model alone")
    parser.add_argument("--init", type=Path, help="fine-tune the network in this file, which phase 1 has saved")
    parser.add_argument("--workers", type=count, default=NUM_WORKERS, help="worker processes (default: %(default)s)")
    args = set_up(parser, steps=192, lr=3e-3, pretrained_lr=5e-5)
    if args.lora is not None and args.model is None:
        parser.error("--lora needs --model.")
    pretrained: LanguageModel | None = None
    tokenizer = None
    if args.model is not None:
        need("transformers", *["peft"] * (args.lora is not None))
        from transformers import AutoTokenizer

        with reading("--model", args.model, "the name or folder of a causal language model with its tokenizer"):
            pretrained = PretrainedLM(args.model, args.lr, args.lora)
            tokenizer = partial(AutoTokenizer.from_pretrained(args.model), add_special_tokens=False, verbose=False)
    with reading("--data", args.data, TEXTS):
        text = windows(load_text(args.data), tokenizer)
    if pretrained is None:
        pretrained = pretrain(args)

    curves = {}
    for method in (LocalSGD, SlowMo, DiLoCo, LearnedLocalSGD):
        print_once(f"\nPhase 2: fine-tuning with {method.__name__}")
        L.seed_everything(args.seed, verbose=False)
        model = copy.deepcopy(pretrained)
        curves[method.__name__] = fit(method(local_steps=args.local_steps), model, text, args)
    report(curves, ["train loss", "val perplexity"], args.out / "finetune_lm.png")


if __name__ == "__main__":
    main()
