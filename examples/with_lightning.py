"""Lightning: `Trainer(callbacks=[ng.integrations.LightningNumGuardCallback()])`."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import hallo_numguard as ng


class Regression(pl.LightningModule):
    """Nothing in it knows of the guard."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        """Of a batch, [n, 8]."""
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


torch.manual_seed(0)
module = Regression()
guard = ng.integrations.LightningNumGuardCallback()
trainer = pl.Trainer(
    accelerator="cpu",
    max_steps=5,
    gradient_clip_val=1.0,
    callbacks=[guard],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
ng.inject(module.net, "parameter", "0.weight", index=(3, 5), step=3)  # the fault, so that there is something to see
try:
    trainer.fit(module, DataLoader(torch.randn(32, 8), batch_size=4))  # type: ignore[arg-type]  # of tensors, as it may
except ng.NumericsError as error:
    print(error)
