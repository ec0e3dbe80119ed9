"""DeepSpeed: `guard = ng.attach(engine)`. Run it as it is, or with torchrun."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from torch import nn

import hallo_numguard as ng

for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 29544}.items():
    os.environ.setdefault(name, str(value))
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
engine, *_ = deepspeed.initialize(
    model=model, optimizer=optimizer, config={**config, "zero_allow_untested_optimizer": True}
)
guard = ng.attach(engine)
ng.inject(engine, "parameter", "0.weight", index=(3, 5), step=3)  # the fault, so that there is something to see

try:
    for _ in range(5):
        loss = engine(torch.randn(4, 8)).square().mean()
        engine.backward(loss)
        engine.step()
except ng.NumericsError as error:
    print(error)
torch.distributed.destroy_process_group()
