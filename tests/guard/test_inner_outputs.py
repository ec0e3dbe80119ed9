"""Models that return what they have made other outputs of: logits beside the loss, hidden states, cached keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hallo_numguard as ng


class Model(nn.Module):
    """Returns its loss, the logits that it was made of, and a hidden state."""

    def __init__(self):
        super().__init__()
        self.enter, self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        hidden = self.enter(x)
        y = self.first(hidden)
        logits = self.last(torch.where(y.isnan(), 0.0, y))  # as some attention kernels do
        return {"loss": logits.float().square().mean(), "logits": logits, "hidden": hidden}


@pytest.mark.parametrize(
    ("is_also_in_the_loss", "power", "is_known"), [(False, 21, True), (True, 21, True), (True, 24, False)]
)
def test_the_loss_scale_that_is_named_is_the_one_where_it_settles(is_also_in_the_loss, power, is_known):
    """Where the part that comes from the loss is not finite, it is known at no other scale."""
    torch.manual_seed(0)
    model, reports = Model(), []
    plain = torch.optim.SGD(model.parameters(), 0.0)
    optimizer = ng.GuardedOptimizer(plain, model, on_overflow=reports.append)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
    x = torch.randn(16, 8)
    while not reports or optimizer.history[-1].applied is False:
        with torch.autocast("cpu", torch.float16):
            output = model(x)
        loss = output["loss"] + (output["hidden"].float().square().mean() if is_also_in_the_loss else 0.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        optimizer.zero_grad()
        scaler.update()
    assert {report.verdict for report in reports} == {"scale_too_high"}
    assert reports[0].settles_at == (optimizer.history[-1].loss_scale if is_known else None)


def test_a_bad_weight_that_the_loss_does_not_see_is_no_fault_of_the_loss():
    torch.manual_seed(0)
    model = Model()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    for step in range(2):
        if step == 1:
            model.first.weight.data[3, 2] = torch.nan
        model(torch.randn(16, 8))["loss"].backward()
        if step == 1:
            with pytest.raises(ng.NumericsError):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    report = optimizer.last_report
    assert (report.verdict, report.first.name, report.first.index) == ("weights_nonfinite", "first.weight", (3, 2))
