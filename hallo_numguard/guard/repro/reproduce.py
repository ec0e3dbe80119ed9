"""Repeats the call in which a module turned finite values into non-finite ones, in this process alone.

    python reproduce.py [--model package.module:function]

Needs torch and the model's own code where Python finds it (PYTHONPATH), and neither DeepSpeed nor hallo-numguard. It
unpickles the files beside it: run it on bundles that you have made yourself. With --model the function is called,
which returns the model with its weights, and the whole batch goes forward through it.

Exit code: 0 something finite became non-finite here too, 1 it did not, 2 it could not be tried.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent


def main() -> int:
    """Runs what the bundle holds, and prints the result."""
    parser = argparse.ArgumentParser(description="Repeats the call in which something became NaN or Inf.")
    parser.add_argument("--model", help="package.module:function, which returns the model with its weights")
    wanted = parser.parse_args().model
    about = json.loads((FOLDER / "bundle.json").read_text())
    print(f"step {about['step']}, rank {about['rank']}: {about['verdict']}; {about['first']}")
    try:
        import_main(about["main"])
        if wanted is not None and not about["why_no_batch"]:
            return run_model(wanted)
        if wanted is not None:
            print(f"the batch is not in this bundle: {about['why_no_batch']}")
            return 2
        if not (FOLDER / "call.pt").exists():
            print(f"there is no single call to repeat: {about['why_no_call']}. Give --model to run the batch.")
            return 2
        return run_call(about["module"])
    except (ImportError, AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"it could not be tried: {error}. Put the model's code on PYTHONPATH.")
        return 2


def import_main(file: str) -> None:
    """Makes the training script's definitions importable under the name that they were pickled by."""
    if not file:
        return
    spec = importlib.util.spec_from_file_location("training_script", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not there")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, value in vars(script).items():
        vars(sys.modules["__main__"]).setdefault(name, value)


def run_call(path: str) -> int:
    """Calls the module, and goes backward through it where a gradient reached it."""
    call = torch.load(FOLDER / "call.pt", map_location="cpu", weights_only=False)
    module = call["module"]
    print(f"module {path or '(the model)'}, a {type(module).__name__}")
    given = [*tensors("input", (call["args"], call["kwargs"])), *module.named_parameters(), *module.named_buffers()]
    given_bad = show("given", given)
    with restored_state(call["random"], call["autocast"]):
        output = module(*call["args"], **call["kwargs"])
    outputs = list(tensors("output", output))
    made_bad = show("made", outputs)
    if not made_bad and any(gradient is not None for gradient in call["grad_outputs"]):
        given_bad |= show("gradient given", named_gradients(outputs, call["grad_outputs"]))
        made_bad = show("gradient made", backward(module, call, outputs))
    if made_bad and not given_bad:
        print("reproduced: finite values became non-finite in this call")
    elif made_bad:
        print("reproduced: what the call was given is not finite already")
    else:
        print("not reproduced: everything is finite here")
    return 0 if made_bad else 1


def backward(module: Any, call: Mapping[str, Any], outputs: list[tuple[str, torch.Tensor]]) -> Any:
    """Returns named gradients with respect to inputs and parameters."""
    pairs = [
        (output, gradient)
        for (_, output), gradient in zip(outputs, call["grad_outputs"], strict=True)
        if gradient is not None and output.requires_grad
    ]
    wanted = [*tensors("input", (call["args"], call["kwargs"])), *module.named_parameters()]
    wanted = [(name, tensor) for name, tensor in wanted if tensor.requires_grad]
    if not pairs or not wanted:
        return []
    made = torch.autograd.grad(
        [output for output, _ in pairs],
        [tensor for _, tensor in wanted],
        grad_outputs=[gradient for _, gradient in pairs],
        allow_unused=True,
    )
    return named_gradients(wanted, made)


def named_gradients(named: Any, gradients: Any) -> list[tuple[str, torch.Tensor]]:
    """Pairs gradients that exist with the names of what they are of."""
    pairs = zip(named, gradients, strict=True)
    return [(name, gradient) for (name, _), gradient in pairs if gradient is not None]


def run_model(wanted: str) -> int:
    """Runs the whole batch through the user's model, and names the first module that made NaN of finite values."""
    place, _, name = wanted.partition(":")
    sys.path.insert(0, ".")
    model = getattr(importlib.import_module(place), name)()
    batch = torch.load(FOLDER / "batch.pt", map_location="cpu", weights_only=False)
    model.train(batch["training"])
    bad: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda _, args, output, path=path: bad.append(path) if is_bad(output) and not is_bad(args) else None
        )
    with restored_state(batch["random"], batch["autocast"]):
        model(*batch["args"], **batch["kwargs"])
    if bad:
        print(f"reproduced: {bad[0] or 'the model'} was given finite values and made others")
    else:
        print("not reproduced: every module made finite values")
    return 0 if bad else 1


@contextlib.contextmanager
def restored_state(random: Mapping[str, torch.Tensor], autocast: str) -> Iterator[None]:
    """Restores the random state and the automatic casts of the call."""
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    dtype = getattr(torch, autocast.removeprefix("torch."), torch.bfloat16)
    with torch.autocast("cpu", dtype=dtype, enabled=bool(autocast)):
        yield


def show(what: str, named: Any) -> bool:
    """Prints one line per tensor; returns whether any is not finite, -Inf in masks left out."""
    bad = False
    for name, tensor in named:
        nan, high, low = (int(test(tensor).sum()) for test in (torch.isnan, torch.isposinf, torch.isneginf))
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        print(f"  {what:15} {name:40} {shape:>16} {str(tensor.dtype)[6:]:9} {nan} NaN, {high} +Inf, {low} -Inf")
        bad = bad or nan + high > 0 or (low > 0 and "gradient" in what)  # masks are written with -Inf
    return bad


def tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every floating-point tensor in nested values, with its path."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from tensors(f"{name}[{position}]", item)


def is_bad(value: Any) -> bool:
    """Whether nested values hold NaN or +Inf."""
    return any(bool((torch.isnan(tensor) | torch.isposinf(tensor)).any()) for _, tensor in tensors("", value))


if __name__ == "__main__":
    sys.exit(main())
