"""Accelerate: `guard = ng.attach(accelerator)` after `prepare`. Also with `accelerate launch`, with any plug-in."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

import hallo_numguard as ng

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
guard = ng.attach(accelerator)
ng.inject(model, "parameter", "0.weight", index=(3, 5), step=5)  # the fault, so that there is something to see

try:
    for _ in range(8):
        with accelerator.accumulate(model):
            loss = model(torch.randn(4, 8)).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
except ng.NumericsError as error:
    print(error)
