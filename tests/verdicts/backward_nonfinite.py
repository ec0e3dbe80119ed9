"""Two equal sentences in a triplet: the root of a distance of 0, as in huggingface/sentence-transformers #4033."""

import torch
from torch import nn
from torch.nn import functional

import hallo_numguard as ng


def euclidean(left, right):
    return (left - right).square().sum(1).sqrt()


torch.manual_seed(0)
model = nn.Sequential(nn.EmbeddingBag(50, 8), nn.Linear(8, 8))
optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), model)
anchor, positive, negative = torch.randint(0, 50, (3, 6, 5))
positive[4] = anchor[4]
for _ in range(2):  # the second is watched operation by operation
    optimizer.zero_grad()
    near, far = euclidean(model(anchor), model(positive)), euclidean(model(anchor), model(negative))
    functional.relu(near - far + 5).mean().backward()
    optimizer.step()
report = optimizer.last_report
