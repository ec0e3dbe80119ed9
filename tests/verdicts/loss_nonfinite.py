"""The log odds of an answer of which the model is certain, as in hpcaitech/ColossalAI #6407."""

import torch
from torch import nn
from torch.nn import functional

import hallo_numguard as ng


def odds_ratio_loss(chosen, rejected):
    odds = chosen - rejected - (torch.log(1 - chosen.exp()) - torch.log(1 - rejected.exp()))
    return -functional.logsigmoid(odds).mean()


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
nn.init.constant_(model[1].bias[3:4], 30.0)
optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), model)
for _ in range(2):  # the second is watched operation by operation
    optimizer.zero_grad()
    logp = model(torch.randint(0, 8, (2, 5))).log_softmax(-1).mean(1)
    odds_ratio_loss(logp[:, 3], logp[:, 2]).backward()
    optimizer.step()
report = optimizer.last_report
