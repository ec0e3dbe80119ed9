"""docs/nan.md: its code runs, its findings exist, and it has a mend for every cause of the table of causes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import hallo_numguard as ng
from hallo_numguard.core.sources import Source
from hallo_numguard.guard.diagnosis import remedies

from causes.table import CAUSES
from paths import ROOT

PAGE = (ROOT / "docs" / "nan.md").read_text(encoding="utf-8")
MENDS = PAGE.split("<!-- table: mends -->")[1]


def source_in(operation: str, explanation: str = "") -> Source:
    name = f"aten.{operation}.default"
    return Source("operation", "", name, "forward", "", None, None, "", 0, tensor=None, explanation=explanation)


@pytest.mark.parametrize("cause", [cause for cause in CAUSES if "Function" not in cause.name], ids=str)
def test_every_cause_has_its_mend_in_the_table(cause):
    texts = [remedies.remedy(source_in(operation)) for operation in cause.operations]
    assert any(f"| {text} |" in MENDS for text in texts), texts


def test_the_rows_name_operations_that_have_that_mend():
    spelled = {"linalg.inv": "linalg_inv_ex", "linalg.solve": "linalg_solve_ex", "to": "_to_copy", "half": "_to_copy"}
    for names, text in remedies.table():
        assert f"| {text} |" in MENDS
        operations = [spelled.get(name, name.replace(".", "_")) for name in names.split()]
        found = {remedies.remedy(source_in(name, "0 times Inf")) for name in operations}
        assert text in found, names


def test_verdicts_and_findings_of_the_page_exist():
    known = {str(verdict) for verdict in ng.Verdict}
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "hallo_numguard" / "guard").rglob("*.py"))
    table = set(
        re.findall(r"^\| `(\w+)` \|", PAGE.split("### Training goes on")[1].split("## The mend")[0], re.MULTILINE)
    )
    named = set(re.findall(r"`([a-z]+_[a-z]+(?:_[a-z]+)*)`", PAGE.split("## By symptom")[1].split("## The mend")[0]))
    findings = table | (named - known - {"zero_grad", "unscale_"})
    assert {"nonfinite", "absurd_weight", "lost_update"} <= findings | {"nonfinite"}
    assert not [name for name in findings if f'"{name}"' not in code]


def test_what_the_page_quotes_is_what_reports_say():
    rooms = ("guard", "core")
    code = "".join(
        path.read_text(encoding="utf-8") for room in rooms for path in (ROOT / "hallo_numguard" / room).rglob("*.py")
    )
    for quoted in (
        "The loss scale has no part in it",
        "no loss scale can mend this",
        "the compiled model made it; run eagerly, the same batch is finite",
    ):
        assert f"`{quoted}`" in PAGE
        assert quoted in code


def test_its_code_runs_as_it_stands(capsys):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    names = {"model": model, "vae": nn.Linear(4, 4), "loss_fn": nn.functional.mse_loss}
    names |= {"batch": torch.randn(3, 4), "target": torch.full((3, 2), float("nan"))}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        names["optimizer"] = names.get("optimizer") or torch.optim.SGD(model.parameters(), lr=0.1)
        if "also=" in block:
            names["optimizer"] = names["optimizer"].detach()
        if "ng.trace" in block:
            names["batch"][1, 2] = float("nan")
        exec(block, names)
        if "loss" in names:
            names.pop("loss").backward()
            names["optimizer"].step()
            assert "target" in names["optimizer"].last_report.summary  # at the first occurrence
            names["optimizer"].zero_grad()
    assert capsys.readouterr().out.strip() != "None"
