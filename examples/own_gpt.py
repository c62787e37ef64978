"""A task of one's own: a small GPT on a text, for `meta_train.py --recipe own --task examples/own_gpt.py`.

The module is that of `finetune_lm.py`, unchanged but for its size; the text is the file that the environment names,
TEXT=novel.txt, or Python's source code.
"""

import os
import sysconfig
from functools import partial
from pathlib import Path

from finetune_lm import GPT, windows

from lightning_lopt.meta import LightningTask


def task() -> LightningTask:
    source = os.environ.get("TEXT")
    files = [Path(source)] if source else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text, _ = windows("".join(file.read_text(encoding="utf-8") for file in files))
    return LightningTask(partial(GPT, lr=3e-3, width=16, depth=2), text, batch_size=4)
