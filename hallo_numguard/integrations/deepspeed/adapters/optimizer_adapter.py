"""Base of the adapters. A subclass, in a file of its own, states everything specific to one class of optimizers."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from hallo_numguard.guard import readable
from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.loss_scaling import LossScaling
from hallo_numguard.guard.parameter_stats import PADDING, Piece
from hallo_numguard.guard.readable import UncheckedTensors, is_plain
from hallo_numguard.guard.state_tensors import state_piece, state_tensors
from hallo_numguard.integrations.deepspeed import autocast
from hallo_numguard.integrations.deepspeed.adapters.gradient_storage import GradientSource, Positions
from hallo_numguard.integrations.deepspeed.version import is_instance_of, require
from hallo_numguard.integrations.patches import MethodPatches
from hallo_numguard.ops.table import StatsTable

Part = tuple[torch.Tensor, Piece]
"""A tensor, and the piece of a parameter that it belongs to."""

Release = tuple[int, ...]


class OptimizerAdapter(ABC):
    """One class of DeepSpeed's optimizers.

    Args:
        optimizer: Instance of that class.
        positions: Position in the guard's list, by parameter.

    Attributes:
        class_names: Names of the class, or of its bases.
        groups_attribute: Attribute with the lists of parameters that it trains, one per group.
        required_attributes: Attributes without which the guard cannot work.
        state_is_sliced: Whether the ranks hold slices of the optimizer's state; else each holds all of it.
        has_masters: Whether it keeps float32 copies of parameters in half precision, which take the updates.
        unchecked: Takes the tensors of the state that are not read.
        names: Names of the parameters in the guard's list, for `unchecked`.
        scaler: GradScaler that calls the optimizer; None if the engine calls it.
    """

    class_names: ClassVar[tuple[str, ...]]
    groups_attribute: ClassVar[str]
    required_attributes: ClassVar[tuple[str, ...]]
    state_is_sliced: ClassVar[bool]
    has_masters: ClassVar[bool] = True

    def __init__(self, optimizer: Any, positions: Positions) -> None:
        self.optimizer = optimizer
        self.positions = positions
        self.scan: ScannedPieces | None = None  # of the step under way
        self.unchecked = UncheckedTensors()
        self.names: list[str] = []
        self.scaler: Any = None

    @classmethod
    def is_for(cls, optimizer: Any) -> bool:
        """Returns whether `optimizer` is of this class."""
        return is_instance_of(optimizer, *cls.class_names)

    @classmethod
    def check_supported(cls, optimizer: Any) -> None:
        """Raises UnsupportedDeepSpeed if `optimizer` lacks an attribute that is needed."""
        require(optimizer, "step", *cls.required_attributes)

    @classmethod
    def parameter_groups(cls, optimizer: Any) -> Iterable[Sequence[torch.Tensor]]:
        """Returns the parameters that `optimizer` trains, by group."""
        groups: Iterable[Sequence[torch.Tensor]] = getattr(optimizer, cls.groups_attribute)
        return groups

    # -- gradients, loss scaling, state ------------------------------------------------------------------------------

    @abstractmethod
    def gradient_source(self) -> GradientSource:
        """Returns the storage of this rank's reduced gradients when the optimizer's step begins."""

    @abstractmethod
    def loss_scaling(self) -> LossScaling:
        """Returns the state of the loss scaler."""

    @abstractmethod
    def state_parts(self) -> Iterator[Part]:
        """Yields this rank's moments and float32 master copies."""

    def state_parts_of(self, position: int | None) -> list[Part]:
        """Returns those of one parameter, as they are now."""
        return [(tensor, piece) for tensor, piece in self.state_parts() if piece.parameter == position]

    def changed_state_parts(self) -> Iterator[Part]:
        """Yields what `state_parts` does, to be changed in place until the next one."""
        return self.state_parts()

    def checks_overflow(self) -> bool:
        """Returns whether the optimizer, in its configuration, checks its gradients at all."""
        return True

    def checks_elements(self) -> bool:
        """Returns whether every rank checks the elements that it holds, and not the norm alone.

        Under tensor parallelism, what several ranks hold counts in the norm on the first of them only.
        """
        return True

    def updates_scale(self) -> bool:
        """Returns whether every step calls `_update_scale`, with the flag that all ranks have agreed on."""
        return hasattr(self.optimizer, "_update_scale")

    def known_bugs(self, release: Release) -> Iterable[str]:
        """Returns the known bugs of this release of DeepSpeed with this optimizer, a sentence each."""
        return autocast.known_bugs(self.optimizer, release)

    def scan_state(self) -> ScannedPieces:
        """Reads the optimizer's state once, one row per parameter and tensor. Not for the hot path.

        A step with a non-finite gradient is skipped, so a non-finite state did not come from a gradient: it was there
        before, or memory was damaged.
        """
        parts = list(self.state_parts())
        found = readable.scan([tensor for tensor, _ in parts])
        return ScannedPieces(found.table, origins(found.table, [parts[owner] for owner in found.owners]))

    def flat_moments(self, optimizer: Any, flat: torch.Tensor) -> list[torch.Tensor]:
        """Returns the tensors of a torch optimizer's state that are as large as a flat tensor; a step count is not."""
        found = []
        for name, value in optimizer.state.get(flat, {}).items():
            if not is_moment(name, value) or value.numel() != flat.numel():
                continue
            if is_plain(value):
                found.append(value)
            elif not self.unchecked.add_if_unread(f"{name} of the flat parameters", value):
                self.unchecked.add(f"{name} of the flat parameters", value, "their parts are not known by parameter")
        return found

    def whole_parts(self, optimizer: Any, key: torch.Tensor, position: int | None, is_master: bool) -> Iterator[Part]:
        """Yields the state of a whole parameter, and `key` itself if it is a master copy.

        Args:
            optimizer: The torch optimizer inside.
            key: Parameter of that optimizer.
            position: Position in the guard's list; None if it is not there.
            is_master: Whether `key` is a copy of the parameter.
        """
        if position is None:
            return
        if is_master:
            yield key, Piece(position, 0)
        parameter = self.names[position] if 0 <= position < len(self.names) else f"parameter {position}"
        for name, value in state_tensors(optimizer, key):
            if not self.unchecked.add_if_unread(f"{name} of {parameter}", value):
                yield value, state_piece(Piece(position, 0), key.numel(), value.numel())

    # -- replace mode: the guard's pass over the gradients stands in for DeepSpeed's own -----------------------------
    #
    # Only the local part is replaced, one rank's computation on its own gradients. Collectives, the decision and the
    # clipping stay DeepSpeed's, because its methods still run: they are given a gradient of one element in place of
    # all of them, whose norm is that of all, and which is NaN if any of them is not finite.

    def reason_to_observe(self) -> str | None:
        """Returns why none of DeepSpeed's passes can be replaced; None if they can."""
        if getattr(self.optimizer, "use_muon", False) or getattr(self.optimizer, "_uses_muon", False):
            return "Muon changes gradients between the check and the norm"
        return None

    @abstractmethod
    def replace_passes(self, patches: MethodPatches) -> None:
        """Patches DeepSpeed's methods so that flag and norm come from `scan`."""

    def begin_step(self, scan: ScannedPieces | None) -> None:
        """Takes the scan of the step that begins; None if there is none, and DeepSpeed has to make its own passes."""
        self.scan = scan

    def end_step(self) -> None:
        """Drops the scan."""
        self.scan = None


def origins(table: StatsTable, parts: Sequence[Part]) -> list[Piece]:
    """Returns the pieces of parts of the state; `PADDING` for what an update has written, beside what it came from.

    LAMB multiplies its update by a ratio of norms: an element of a moment makes master copies bad as a whole.

    Args:
        table: Statistics of the parts, one row each.
        parts: The parts.
    """
    bad = table.nonfinite_counts.sum(dim=1).tolist()
    are_whole = [count == tensor.numel() > 1 for count, (tensor, _) in zip(bad, parts, strict=True)]
    has_origin = any(count > 0 and not is_whole for count, is_whole in zip(bad, are_whole, strict=True))
    pieces = [piece for _, piece in parts]
    if not has_origin:
        return pieces
    return [PADDING if is_whole else piece for piece, is_whole in zip(pieces, are_whole, strict=True)]


def is_moment(name: object, value: object) -> bool:
    """Returns whether an entry of a torch optimizer's state has numbers of elements.

    What `engine.offload_states` has left there is none: a copy that is not read any more.
    """
    return isinstance(value, torch.Tensor) and value.numel() > 1 and not str(name).endswith("_offload_buffer")


def linked_parts(adapter: OptimizerAdapter, flats: Any) -> Iterator[Part]:
    """Yields state by DeepSpeed's links from parameters to fragments of flat master partitions.

    Args:
        adapter: Adapter of an optimizer that has a torch optimizer inside.
        flats: Flat float32 partitions, one per parameter group.

    Source: deepspeed/utils/tensor_fragment.py.
    """
    for parameter, position in adapter.positions.items():
        link: Any = getattr(parameter, "_hp_mapping", None)
        if link is None:
            continue
        flat = flats[link.param_group_index]
        begin, size = int(link.hp_fragment_address.start), int(link.hp_fragment_address.numel)
        for tensor in [flat, *adapter.flat_moments(adapter.optimizer.optimizer, flat)]:
            yield tensor.view(-1)[begin : begin + size], Piece(position, int(link.lp_fragment_address.start))


def zero_loss_scaling(optimizer: Any) -> LossScaling:
    """Returns the state of the loss scaler object of ZeRO stages 1 to 3."""
    of_autocast = autocast.scaling_of_zero(optimizer)
    if of_autocast is not None:
        return of_autocast
    scaler = optimizer.loss_scaler
    return LossScaling(
        scale=float(scaler.cur_scale),
        dynamic=bool(scaler.dynamic),
        minimum=float(getattr(scaler, "min_scale", 1.0)),
        patience=max(0, int(getattr(scaler, "cur_hysteresis", 1)) - 1),
    )


def takes_bad_norm_for_overflow() -> bool:
    """Returns whether this DeepSpeed treats a norm that is not finite as an overflow (>= 0.19.8)."""
    return hasattr(sys.modules.get("deepspeed.runtime.utils"), "is_invalid_grad_norm")


@contextlib.contextmanager
def attribute_set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
