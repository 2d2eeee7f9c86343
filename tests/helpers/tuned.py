"""Makes a tiny module with any tuning, and trains it repeatedly on one batch."""

from functools import partial

import lightning
import torch
from torch import nn

from lightning_modules.training.instruct import VideoLLMModule
from lightning_modules.training.tuning import Tuning
from tests.lightning_modules.test_model import COUNTS, MIXED, make_batch, specs

LORA = {"targets": ["q_proj", "v_proj", "down_proj"], "rank": 4, "alpha": 32, "dropout": 0.0}
BATCH = make_batch(MIXED, COUNTS)


def make_module(tuning=None, optimizer=None, scheduler=None, **options):
    torch.manual_seed(0)
    optimizer = optimizer or partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    return VideoLLMModule(specs(**options), optimizer, scheduler, tuning)


def train(module, steps=3, **options):
    """Trains a module as shipped, repeatedly on one batch."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule=Again(steps))
    return trainer


class Again(lightning.LightningDataModule):
    def __init__(self, steps):
        super().__init__()
        self._steps = steps

    def __len__(self):
        return self._steps

    def __iter__(self):
        return iter([BATCH] * self._steps)

    def train_dataloader(self):
        return self

    def val_dataloader(self):
        return self


def trained_lora(**changes):
    """Returns a model with nonzero LoRA weights."""
    module = make_module(Tuning(lora=LORA | changes))
    for name, parameter in module.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return module.network.eval()


def hidden(network):
    with torch.no_grad():
        return network.eval()(BATCH).hidden
