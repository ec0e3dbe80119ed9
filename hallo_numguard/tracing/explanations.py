"""What an operation was given where its result is not finite, in a sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

_LARGE = {torch.float16: 1e3, torch.bfloat16: 1e30, torch.float32: 1e30, torch.float64: 1e250}
"""Numbers of which a few products, or sums of products, leave the range of the dtype."""

Index = tuple[int, ...]


class Explanation(NamedTuple):
    """What an operation was given where its result is not finite.

    Attributes:
        text: Sentence; "" if nothing is known.
        is_singular: Whether the operation has no finite value there, or none at all, however small a factor of its
            arguments is.
    """

    text: str = ""
    is_singular: bool = False


Explain = Callable[[Sequence[Any], Mapping[str, Any], torch.Tensor, Index], Explanation]


def explain(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: torch.Tensor, index: Index
) -> Explanation:
    """Returns what the operation was given at the first non-finite element of its result.

    Args:
        name: Name of the operation, without namespace and overload.
        args: Its arguments. In-place operations have overwritten the first.
        kwargs: Its named arguments.
        result: A non-finite result.
        index: Index of the first non-finite element.
    """
    explanation = _EXPLANATIONS.get(name.removesuffix("_") if not name.startswith("_") else name)
    if explanation is None:
        return Explanation()
    with contextlib.suppress(Exception):  # an argument of another form than was thought of
        return explanation(args, kwargs, result, index)
    return Explanation()


def large_arguments(
    given: Sequence[torch.Tensor], name_of: Callable[[torch.Tensor], tuple[str, str] | None], dtype: torch.dtype
) -> str:
    """Returns a sentence on the argument with the largest finite number, if that is near what the dtype can hold."""
    limit = _LARGE.get(dtype)
    if limit is None:
        return ""
    largest, of = 0.0, None
    for tensor in given:
        finite = tensor[tensor.isfinite()]
        absmax = float(finite.abs().max()) if finite.numel() else 0.0
        if absmax > largest:
            largest, of = absmax, tensor
    if of is None or largest < limit:
        return ""
    named = name_of(of)
    return f"{' '.join(named) if named else 'an argument'} holds numbers of up to {largest:.4g}"


def _at(value: Any, result: torch.Tensor, index: Index) -> float:
    """An argument's number for an element of the result."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    return float(value.expand(result.shape)[index])


def _number(value: float) -> str:
    return f"{value:.4g}"


def _div(args: Sequence[Any], _: Mapping[str, Any], result: torch.Tensor, index: Index) -> Explanation:
    divisor = _at(args[1], result, index)
    dividend = None if args[0] is result or _shares_memory(args[0], result) else _at(args[0], result, index)
    if divisor == 0:
        return Explanation(f"{'a number' if dividend is None else _number(dividend)} was divided by 0", True)
    return Explanation("" if dividend is None else f"{_number(dividend)} was divided by {_number(divisor)}")


def _shares_memory(value: Any, result: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.data_ptr() == result.data_ptr()


def _function_of(what: str, grows: bool) -> Explain:
    """The explanation of a function of one number.

    Args:
        what: Words before the number.
        grows: Whether the function has a finite value everywhere, which may be too large for the dtype.
    """

    def explanation(args: Sequence[Any], _: Mapping[str, Any], result: torch.Tensor, index: Index) -> Explanation:
        if _shares_memory(args[0], result):
            return Explanation("", not grows)
        return Explanation(f"{what} {_number(_at(args[0], result, index))}", not grows)

    return explanation


def _pow(args: Sequence[Any], _: Mapping[str, Any], result: torch.Tensor, index: Index) -> Explanation:
    exponent = _at(args[1], result, index)
    if _shares_memory(args[0], result):
        return Explanation(f"a power with exponent {_number(exponent)}")
    base = _at(args[0], result, index)
    is_singular = base < 0 or (base == 0 and exponent < 0)
    return Explanation(f"{_number(base)} to the power of {_number(exponent)}", is_singular)


def _softmax(args: Sequence[Any], _: Mapping[str, Any], result: torch.Tensor, index: Index) -> Explanation:
    scores, dim = args[0], int(args[1])
    row = tuple(slice(None) if at == dim % scores.dim() else place for at, place in enumerate(index))
    values = scores[row]
    where = ", ".join(":" if isinstance(at, slice) else str(at) for at in row)
    if bool((values == -torch.inf).all()):
        return Explanation(f"row [{where}] is masked throughout (-Inf in all of its {values.numel()} places)", True)
    if bool((values == torch.inf).any()):
        return Explanation(f"row [{where}] holds +Inf", True)
    return Explanation()


def _mean(args: Sequence[Any], _: Mapping[str, Any], result: torch.Tensor, index: Index) -> Explanation:
    return Explanation("it is the mean of no element", True) if args[0].numel() == 0 else Explanation()


def _deviation(args: Sequence[Any], kwargs: Mapping[str, Any], result: torch.Tensor, index: Index) -> Explanation:
    values = args[0]
    count = values.numel() // max(1, result.numel())
    return Explanation(f"it was taken of {count} value{'' if count == 1 else 's'} each" if count <= 1 else "", True)


def _nll(args: Sequence[Any], _: Mapping[str, Any], result: torch.Tensor, index: Index) -> Explanation:
    target, ignored = args[1], int(args[4])
    if target.numel() == 0:
        return Explanation("there is no label", True)
    if bool((target == ignored).all()):
        return Explanation(f"all {target.numel()} labels are {ignored}, which is ignored: the mean of no element", True)
    return Explanation()


def _ctc(args: Sequence[Any], _: Mapping[str, Any], result: torch.Tensor, index: Index) -> Explanation:
    at = index[0] if index else 0
    lengths = [list(map(int, value)) for value in args[2:4]]
    return Explanation(f"utterance {at}: {lengths[0][at]} frames, and {lengths[1][at]} labels", True)


def _cast(args: Sequence[Any], _: Mapping[str, Any], result: torch.Tensor, index: Index) -> Explanation:
    value = float(args[0][index])
    dtype, largest = str(result.dtype).removeprefix("torch."), torch.finfo(result.dtype).max
    return Explanation(f"{_number(value)} is too large for {dtype}, whose largest number is {largest:.5g}")


def _normalisation(args: Sequence[Any], _: Mapping[str, Any], result: torch.Tensor, index: Index) -> Explanation:
    eps = next((value for value in reversed(args) if isinstance(value, float)), None)
    return Explanation(f"its eps is {eps:g}" if eps is not None and eps < 1e-12 else "", True)


def _weight_norm(args: Sequence[Any], _: Mapping[str, Any], result: torch.Tensor, index: Index) -> Explanation:
    direction, dim = args[0], int(args[2]) if len(args) > 2 else 0
    row = direction.select(dim, index[dim])
    place = ", ".join(str(index[dim]) if at == dim else ":" for at in range(direction.dim()))
    return Explanation(f"[{place}] of the weight has norm 0" if not bool(row.any()) else "", True)


_FUNCTIONS = {
    "log": "the logarithm of",
    "log2": "the logarithm of",
    "log10": "the logarithm of",
    "log1p": "log1p of",
    "sqrt": "the square root of",
    "rsqrt": "1 divided by the square root of",
    "reciprocal": "1 divided by",
    "exp": "exp of",
    "exp2": "2 to the power of",
    "expm1": "expm1 of",
    "sinh": "sinh of",
    "cosh": "cosh of",
    "acos": "acos of",
    "asin": "asin of",
    "acosh": "acosh of",
    "atanh": "atanh of",
    "erfinv": "erfinv of",
    "logit": "logit of",
    "lgamma": "lgamma of",
    "digamma": "digamma of",
    "tan": "tan of",
    "square": "the square of",
    "special_ndtri": "ndtri of",
}

_GROWING = ("exp", "exp2", "expm1", "sinh", "cosh", "square", "tan")

_EXPLANATIONS: dict[str, Explain] = {
    **{name: _function_of(what, name in _GROWING) for name, what in _FUNCTIONS.items()},
    "div": _div,
    "true_divide": _div,
    "pow": _pow,
    "_softmax": _softmax,
    "_log_softmax": _softmax,
    "mean": _mean,
    "std": _deviation,
    "var": _deviation,
    "std_mean": _deviation,
    "var_mean": _deviation,
    "nll_loss_forward": _nll,
    "nll_loss2d_forward": _nll,
    "_ctc_loss": _ctc,
    "_to_copy": _cast,
    "native_layer_norm": _normalisation,
    "native_group_norm": _normalisation,
    "native_batch_norm": _normalisation,
    "_fused_rms_norm": _normalisation,
    "_weight_norm_interface": _weight_norm,
}
