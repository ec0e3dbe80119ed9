"""The trace: whatever goes wrong in whatever kind of module, the first that turned finite into non-finite is named."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import hallo_numguard as ng

from campaign.models import MODELS


class Wrap(nn.Module):
    """Puts a faulty module between two sound ones."""

    def __init__(self, faulty: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.faulty = faulty
        self.after = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        return self.after(self.faulty(self.before(x)))


class Of(nn.Module):
    """A module of one function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def first_of(model, *inputs, **options):
    """Returns the origin that a trace of both passes names."""
    with ng.trace(model, **options) as tr:
        model(*inputs).sum().backward()
    return tr.first_nonfinite


FORWARD = {
    "softmax of a row that is masked throughout": lambda x: functional.softmax(x * 0 + float("-inf"), dim=-1),
    "a norm that divides by zero": lambda x: (x - x) / (x - x).norm(),
    "the logarithm of a negative number": lambda x: torch.log(-x.abs() - 1),
    "a float16 overflow": lambda x: (x.half() * 60000 * 60000).float(),
    "an exponential": lambda x: torch.exp(x.abs() * 1e4 + 100),
}


@pytest.mark.parametrize("what", FORWARD)
def test_a_module_whose_output_is_the_first_that_is_not_finite(what):
    torch.manual_seed(0)
    model = Wrap(Of(FORWARD[what]))
    first = first_of(model, torch.randn(3, 4), operations=True)
    assert (first.name, first.module, first.phase, first.call, first.kind) == (
        "faulty",
        "Of",
        "forward",
        0,
        "activation",
    )
    assert first.tensor.name == "output"
    assert len(first.index) == 2
    assert first.operation.startswith("aten.")
    assert "test_trace.py" in first.operation
    assert any(not math.isfinite(value) for value in first.neighbours)


def test_the_operation_is_the_one_that_made_it():
    model = Wrap(Of(lambda x: torch.relu(torch.sqrt(x - x - 1.0) + 1.0)))
    first = first_of(model, torch.randn(3, 4), operations=True)
    assert first.operation.startswith("aten.sqrt.default at ")


class Twice(torch.autograd.Function):
    """Twice its input; its derivative is NaN in one place."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        wrong = gradient * 2
        wrong[1, 2] = float("nan")
        return wrong


BACKWARD = {
    "a square root at 0": lambda x: x + (x - x).sqrt(),
    "a custom function": Twice.apply,
    "a norm at 0": lambda x: x + (x - x).pow(2).sum().sqrt(),
}


@pytest.mark.parametrize("what", BACKWARD)
def test_a_module_that_is_bad_in_the_backward_pass_only(what):
    model = Wrap(Of(BACKWARD[what]))
    first = first_of(model, torch.randn(3, 4))
    assert (first.name, first.phase, first.kind) == ("faulty", "backward", "gradient")
    if what == "a custom function":
        assert (first.index, first.tensor.record.nan) == ((1, 2), 1)


def test_code_between_modules_is_its_callers():
    class Root(nn.Module):
        def __init__(self, backward):
            super().__init__()
            self.first, self.last, self.backward_only = nn.Linear(4, 4), nn.Linear(4, 4), backward

        def forward(self, x):
            x = self.first(x)
            x = x + (x - x).sqrt() if self.backward_only else torch.log(-x.abs())
            return self.last(x)

    for backward in (True, False):
        model = nn.Sequential(Root(backward))
        first = first_of(model, torch.randn(3, 4))
        assert (first.name, first.module) == ("0", "Root")
        assert first.phase == ("backward" if backward else "forward")


def test_a_bad_weight_is_named_and_not_the_module_that_uses_it():
    model = Wrap(nn.Linear(4, 4))
    with torch.no_grad():
        model.faulty.weight[2, 1] = float("nan")
    first = first_of(model, torch.randn(3, 4))
    assert (first.name, first.kind, first.index) == ("faulty.weight", "parameter", (2, 1))


def test_an_embedding_with_a_bad_row_is_named_if_the_row_is_read():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[3] = float("inf")
    assert first_of(model, torch.tensor([0, 1, 2])) is None
    first = first_of(model, torch.tensor([0, 3]))
    assert (first.name, first.index) == ("0.weight", (3, 0))


def test_a_bad_input_is_named():
    model = Wrap(nn.Identity())
    x = torch.randn(3, 4)
    x[2, 3] = float("nan")
    first = first_of(model, x)
    assert (first.kind, first.name, first.index) == ("input", "input[0]", (2, 3))


class Masked(nn.Module):
    """An additive mask of -Inf, and labels that are NaN where nothing is known: both as they should be."""

    def __init__(self, faulty: bool) -> None:
        super().__init__()
        self.score = nn.Linear(4, 4)
        self.faulty = Of(lambda x: torch.log(-x.abs() - 1) if faulty else x)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask, labels):
        x = self.softmax(self.faulty(self.score(x)) + mask)
        known = ~labels.isnan()
        return (x[known] - labels[known]).square().mean()


def test_legal_infinities_and_nans_do_not_blind_it():
    mask = torch.full((4, 4), float("-inf")).triu(1)
    labels = torch.randn(4, 4)
    labels[1] = float("nan")
    for faulty in (False, True):
        model = Masked(faulty)
        with ng.trace(model) as tr:
            model(torch.randn(4, 4), mask, labels=labels).backward()
        assert (tr.first_nonfinite and tr.first_nonfinite.name) == ("faulty" if faulty else None)


def test_an_overflow_to_negative_infinity_is_whose_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(dim=-1)).half()
    with torch.no_grad():
        model[0].weight.fill_(-60000)
        model[0].bias.fill_(0)
    first = first_of(model, torch.ones(2, 4).half())
    assert (first.name, first.tensor.record.neg_inf) == ("0", 8)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    nothing: None = None


class Structures(nn.Module):
    """What modules pass around: dicts, tuples, dataclasses, None; one is called twice, one works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.in_place = nn.ReLU(inplace=True)
        self.none = Of(lambda x: None)
        self.wrapped = Of(lambda x: Output(x["x"][0] * 2))
        self.last = Of(lambda x: x.hidden.sum())

    def forward(self, x):
        x = self.in_place(self.shared(self.shared(x)))
        self.none(x)
        return self.last(self.wrapped({"x": (x, "text")}))


def test_structures_shared_modules_and_work_in_place():
    model = Structures()
    x = torch.randn(3, 4)
    with ng.trace(model) as tr:
        loss = model(x)
        loss.backward()
    frames = {(frame.name, frame.call): frame for frame in tr.frames}
    assert [frame.name for frame in tr.frames] == ["shared", "shared", "in_place", "none", "wrapped", "last", ""]
    assert frames["none", 0].outputs == ()
    assert frames["wrapped", 0].inputs[0].name == "input[0]['x'][0]"
    assert frames["wrapped", 0].outputs[0].name == "output.hidden"
    assert frames["last", 0].outputs[0].record.sumsq == pytest.approx(loss.item() ** 2)
    hidden = model.shared(model.shared(x))
    assert frames["shared", 1].outputs[0].record.sumsq == pytest.approx(hidden.square().sum().item())
    assert frames["in_place", 0].outputs[0].record.sumsq == pytest.approx(hidden.relu().square().sum().item())
    gradient = frames["last", 0].grad_outputs[0]
    assert gradient.record.sumsq == 1.0
    weight = next(item for item in frames["shared", 0].grad_weights if item.name == "weight")
    assert weight.record.sumsq == pytest.approx(model.shared.weight.grad.square().sum().item())
    assert frames["shared", 1].parent == frames["", 0].position


def test_checkpointed_blocks_are_called_twice_and_named_once():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.first, self.block, self.reentrant = nn.Linear(4, 4), Wrap(Of(BACKWARD["a custom function"])), reentrant

        def forward(self, x):
            return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)

    for reentrant in (True, False):
        model = Checkpointed(reentrant)
        first = first_of(model, torch.randn(3, 4))
        assert (first.name, first.phase) == ("block.faulty", "backward")


@pytest.mark.parametrize("name", list(MODELS))
def test_real_models_compute_the_same_bits_under_a_trace(name):
    def run(traced):
        torch.manual_seed(0)
        model = MODELS[name]()
        arguments, target = model.batch(torch.Generator().manual_seed(1), torch.float32)
        with ng.trace(model, operations=True) if traced else torch.enable_grad():
            loss = model.loss(model(*arguments), target)
            loss.backward()
        return loss, [parameter.grad for parameter in model.parameters()], model

    (loss, gradients, _), (traced_loss, traced, model) = run(False), run(True)
    assert torch.equal(loss, traced_loss)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(gradients, traced, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize("name", list(MODELS))
def test_a_planted_activation_is_named_with_its_element(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    arguments, _ = model.batch(torch.Generator().manual_seed(1), torch.float32)
    index = (2, 3, 1)
    planted = ng.inject(model, "activation", model.module, index=index, value=float("inf"))
    first = first_of(model, *arguments)
    planted.remove()
    assert (first.name, first.index) == (model.module, index)


def test_only_the_end_is_kept_if_the_first_is_all_that_is_wanted():
    layers = [nn.Linear(4, 4) for _ in range(300)]
    layers.insert(100, Of(lambda x: x / 0))
    model = nn.Sequential(*layers)
    with ng.trace(model, stop_at_first=True) as tr:
        model(torch.randn(2, 4))
    assert tr.first_nonfinite.name == "100"
    assert len(tr.frames) <= 32
    assert tr.frames[-1].name != "300"


def test_a_mask_of_negative_infinity_does_not_end_a_trace_that_stops_at_the_first():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(40)], Of(lambda x: x.abs() / 0), nn.Linear(4, 4))
    model.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    assert first_of(model, torch.randn(2, 4), stop_at_first=True).name == "40"


def test_a_trace_survives_its_file(tmp_path):
    model = Wrap(Of(FORWARD["the logarithm of a negative number"]))
    with ng.trace(model, operations=True) as tr:
        model(torch.randn(3, 4)).sum().backward()
    for name in ("trace.jsonl", "trace.jsonl.gz"):
        tr.save(tmp_path / name)
        read = ng.load_trace(tmp_path / name)
        assert list(read.frames) == tr.frames
        assert repr(read.first_nonfinite) == repr(tr.first_nonfinite)
    assert (tmp_path / "trace.jsonl.gz").stat().st_size < (tmp_path / "trace.jsonl").stat().st_size


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\x1f\x8bjunk", b'{"kind": "trace", "schema_version": 99}', b"\xff"]
)
def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.jsonl is not a trace"):
        ng.load_trace(path)


def test_what_cannot_be_traced_is_refused():
    with pytest.raises(ng.InvalidInput, match=r"torch\.nn\.Module"), ng.trace(lambda x: x):
        pass
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ng.InvalidInput, match="1: it is TorchScript"), ng.trace(model):
        pass
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].compile()
    with pytest.raises(ng.InvalidInput, match="1: it is compiled"), ng.trace(model):
        pass
    with pytest.raises(ng.InvalidInput, match="compiled"), ng.trace(torch.compile(nn.Linear(2, 2))):
        pass


def test_an_error_of_the_model_passes_through_and_the_hooks_come_off():
    def fail(x):
        raise KeyError("mine")

    model = Wrap(Of(fail))
    with pytest.raises(KeyError, match="mine"), ng.trace(model) as tr:
        model(torch.randn(3, 4))
    assert [frame.name for frame in tr.frames] == ["before", "faulty", ""]
    assert not any(module._forward_hooks for module in model.modules())
