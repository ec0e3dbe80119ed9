"""What mends an operation that makes non-finite values."""

from __future__ import annotations

import re

from hallo_numguard.core.sources import WRITTEN_DOWN, Source

_TOO_LARGE = (
    "What it is given is too large for the dtype: normalise it, run this part in bfloat16 or float32 (outside of "
    "autocast to float16), or lower the learning rate if it has grown during training."
)
_NOT_AFTERWARDS = (
    "Choosing afterwards (torch.where, clamp, a mask) does not help: the gradient there is NaN all the same."
)

_REMEDIES = {
    "softmax": (
        "Leave at least one place of every row unmasked, or mask with a finite number "
        "(torch.finfo(dtype).min), or take such rows out before the softmax. "
        f"{_NOT_AFTERWARDS}"
    ),
    "ctcloss": (
        "Leave out what has more labels than frames (a repeated label needs a frame more), or set "
        "zero_infinity=True (ctc_zero_infinity in transformers)."
    ),
    "nllloss": ("Skip batches without a valid label, or divide the sum (reduction='sum') by max(1, number of labels)."),
    "log": (
        "Clamp its argument (x.clamp_min(eps)), or use a stable form (log_softmax, logsigmoid, log1p, "
        "xlogy). "
        f"{_NOT_AFTERWARDS}"
    ),
    "sqrt": (
        "Its derivative is infinite at 0, and it is NaN below: use sqrt(x + eps), or "
        "x.clamp_min(eps).sqrt(). "
        f"{_NOT_AFTERWARDS}"
    ),
    "div": (
        "Keep the divisor away from 0 before the division: x / (y + eps), y.clamp_min(eps), and y.clamp_min(1) of what "
        f"counts labels or the elements of a mask. {_NOT_AFTERWARDS}"
    ),
    "pow": (
        "A power of a negative number with a fractional exponent is NaN, and at 0 the derivative of one "
        "below 1 is infinite: use x.clamp_min(eps).pow(p), or x.abs(). "
        f"{_NOT_AFTERWARDS}"
    ),
    "exp": (
        "Clamp its argument before it (float32 ends at exp(88.7), float16 at exp(11.0)), or subtract the "
        "maximum first. "
        f"{_NOT_AFTERWARDS}"
    ),
    "norm": (
        "The derivative of a norm at 0 is not finite: add eps inside of the root, (x.square().sum() + "
        "eps).sqrt(), or leave zero vectors out."
    ),
    "weightnorm": (
        "A part of the weight whose norm is 0 has no direction, and 0 / 0 is NaN: look for rows that were pruned or "
        "initialised to 0, and give them small values, or leave this weight without weight_norm."
    ),
    "std": (
        "The standard deviation of one value is NaN, and of equal values it has an infinite derivative: add "
        "eps under the root, (x.var(correction=0) + eps).sqrt(), and look at the size of the last batch "
        "(drop_last)."
    ),
    "mean": (
        "The mean of no element is NaN: look at the mask that has selected nothing, and divide the sum by "
        "max(1, count)."
    ),
    "cdist": (
        "The derivative of a distance of 0 is not finite: add eps inside of the root, or leave the pairs of "
        "a point with itself out."
    ),
    "atan2": ("Its derivative at (0, 0) is not finite: add eps to its second argument."),
    "inverse": (
        "Its derivative is infinite at the ends of its range: clamp the argument to (-1 + eps, 1 - eps). "
        f"{_NOT_AFTERWARDS}"
    ),
    "pole": "It is infinite at 0 and at negative whole numbers: clamp its argument to eps and above.",
    "decomposition": (
        "The derivative of singular vectors and eigenvectors is not finite where two of the values are "
        "equal (or one is 0): add a small random diagonal, take the values only, or detach the vectors."
    ),
    "cholesky": ("Add a small multiple of the identity before it: the matrix is not positive definite."),
    "tocopy": (
        "A number is too large for the dtype that it is converted to: keep this part in bfloat16 or "
        "float32, or clamp before the conversion; rows that nobody reads count as well, as 0 times Inf is "
        "NaN."
    ),
    "product": _TOO_LARGE,
    "sum": _TOO_LARGE,
    "mul": ("0 times Inf is NaN: look at what made the Inf, and leave it out before the product."),
    "normalisation": ("Its eps is too small for the dtype, or what it is given is: look at rows that are constant."),
}

_FAMILIES = {
    "softmax": "softmax logsoftmax scaleddotproduct scaleddotproductflashattentionforcpu",
    "ctcloss": "ctcloss",
    "nllloss": "nlllossforward nllloss2dforward nllloss nlllossnd crossentropyloss",
    "log": "log log2 log10 log1p logit xlogy binarycrossentropy klDiv",
    "sqrt": "sqrt rsqrt",
    "div": "div truedivide reciprocal fmod remainder",
    "pow": "pow floatpower",
    "exp": "exp exp2 expm1 sinh cosh softplus logsumexp",
    "norm": "norm linalgvectornorm linalgmatrixnorm linalgnorm frobeniusnorm renorm",
    "weightnorm": "weightnorm weightnorminterface",
    "std": "std var stdmean varmean",
    "mean": "mean nanmean",
    "cdist": "cdist cdistforward pdist pdistforward cosinesimilarity pairwisedistance",
    "atan2": "atan2",
    "inverse": "acos asin acosh atanh erfinv",
    "pole": "lgamma digamma polygamma",
    "decomposition": "linalgsvd svd linalgeigh linalgeig linalgqr",
    "cholesky": "cholesky linalgcholeskyex linalgcholesky linalginvex linalginv linalgsolveex",
    "tocopy": "tocopy copy copyslices",
    "product": "mm bmm addmm baddbmm matmul linear convolution convolutionoverrideable dot mv einsum prod cumprod",
    "sum": "sum cumsum add logcumsumexp square",
    "mul": "mul addcmul addcdiv",
    "normalisation": "nativelayernorm nativegroupnorm nativebatchnorm fusedrmsnorm rmsnorm",
}
_TITLES = {
    "softmax": "softmax log_softmax scaled_dot_product_attention",
    "ctcloss": "ctc_loss",
    "nllloss": "nll_loss cross_entropy",
    "log": "log log1p logit xlogy binary_cross_entropy kl_div",
    "sqrt": "sqrt rsqrt",
    "div": "div reciprocal fmod remainder",
    "pow": "pow",
    "exp": "exp expm1 sinh cosh softplus logsumexp",
    "norm": "norm linalg.norm renorm",
    "weightnorm": "weight_norm",
    "std": "std var",
    "mean": "mean nanmean",
    "cdist": "cdist pdist cosine_similarity pairwise_distance",
    "atan2": "atan2",
    "inverse": "acos asin acosh atanh erfinv",
    "pole": "lgamma digamma polygamma",
    "decomposition": "linalg.svd linalg.eigh linalg.eig linalg.qr",
    "cholesky": "linalg.cholesky linalg.inv linalg.solve",
    "tocopy": "to half",
    "product": "matmul linear conv2d einsum dot prod",
    "sum": "sum cumsum add square",
    "mul": "mul addcmul addcdiv",
    "normalisation": "layer_norm group_norm batch_norm rms_norm",
}
_FAMILY_OF = {name: family for family, names in _FAMILIES.items() for name in names.lower().split()}


def remedy(source: Source) -> str:
    """Returns what to do about a source that is an operation."""
    if source.large.startswith(("parameter ", "buffer ")):
        return f"Repair it: {source.large}. It was not initialised, not loaded right, or written by other code."
    if source.explanation == WRITTEN_DOWN:
        return "Look at why that line writes it."
    found = _FAMILY_OF.get(base_name(source.operation))
    if source.phase == "backward":  # the operation of the forward pass says more than what its backward pass is made of
        found = _FAMILY_OF.get(re.sub(r"backward\d*$", "", source.node.lower()), found)
    if found == "mul" and source.phase == "forward" and "Inf" not in source.explanation:
        found = "product"
    if found is None:
        return f"Look at what it is given there{': ' + source.large if source.large else ''}."
    return _REMEDIES[found]


def table() -> list[tuple[str, str]]:
    """Returns what mends each family of operations: names of operations, separated by spaces, and the remedy."""
    return [(_TITLES[family], text) for family, text in _REMEDIES.items()]


def base_name(operation: str) -> str:
    """Returns the name of an operation without namespace, overload and underscores."""
    return operation.split(".")[1].replace("_", "") if "." in operation else operation


def spoken_name(source: Source) -> str:
    """Returns the name of an operation as a user of torch knows it."""
    if source.phase == "backward" and source.node:
        name = re.sub(r"Backward\d*$", "", source.node)
        return f"the backward pass of {_SPOKEN.get(name.lower(), name.lower())}"
    parts = source.operation.split(".")
    name = parts[1].strip("_") if len(parts) > 1 else source.operation
    return _SPOKEN.get(name.replace("_", ""), name)


_SPOKEN = {
    "tocopy": "a conversion of dtype",
    "nlllossforward": "nll_loss",
    "nllloss": "nll_loss",
    "nllloss2dforward": "nll_loss",
    "ctcloss": "ctc_loss",
    "logsoftmax": "log_softmax",
    "nativelayernorm": "layer_norm",
    "nativegroupnorm": "group_norm",
    "nativebatchnorm": "batch_norm",
    "linalgvectornorm": "norm",
    "linalgsvd": "linalg.svd",
    "linalgeigh": "linalg.eigh",
    "linalgcholeskyex": "linalg.cholesky",
    "weightnorminterface": "weight_norm",
    "mm": "a matrix product",
    "addmm": "a matrix product",
    "bmm": "a matrix product",
    "baddbmm": "a matrix product",
    "scaleddotproductflashattentionforcpu": "scaled_dot_product_attention",
}
