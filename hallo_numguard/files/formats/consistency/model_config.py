"""The configuration of a model against its tensors: heads, vocabulary, widths, layers, experts, and empty files."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.consistency.contents import Contents
from hallo_numguard.files.formats.consistency.sidecar_json import configuration, document, document_or_empty
from hallo_numguard.files.formats.source import DamagedFile

_ADAPTER = "adapter_config.json"
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared|word_embedding)\.weight$"
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output|output_layer|decoder|cls|generator|lm_proj|head|proj_out|score)(\.|$)"
)
_GENERATES = re.compile(r"ForCausalLM$|LMHeadModel$")
_CLASSIFIES = re.compile(r"For(Sequence|Token|Image|Audio)\w*Classification$|ForQuestionAnswering$")
_CLASSIFIER = re.compile(r"classif|score|qa_|logits|head|summary|label|output_layer", re.IGNORECASE)
_LAYER = re.compile(r"^(?P<before>.*?(^|\.)(layers|layer|h|blocks))\.(?P<number>\d{1,6})\.")
_EXPERT = re.compile(r"^(?P<before>(.*\.)?experts)\.(?P<number>\d{1,6})\.")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
_ANY_EMBEDDING = re.compile(r"emb|wte|shared|tok", re.IGNORECASE)
_FIRST_FACTOR = re.compile(r"\.lora_A\.(\w+\.)?weight$")
_WRAPPER = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.")
_BY_LOADERS = ("bitnet", "torchao", "quark", "auto-round")  # methods whose weights may lie there as they were
_MAX_TOKENS = 4_000_000
_MAX_NAMES = 5  # in a message
_MIN_WEIGHTS = 3  # of a layer, to tell its kind
_WEIGHT_FILES = re.compile(r"^(model|pytorch_model|adapter_model|diffusion_pytorch_model)\b.*\.(safetensors|bin)$")
_CONFIG_REMEDY = "Take configuration and weights from the same save."


def check(contents: Contents, is_whole: bool) -> Iterator[Finding]:
    """Checks the configuration of a folder against the tensors in it, if no file of weights is missing or damaged."""
    for name in ("config.json", _ADAPTER, "generation_config.json", "model_index.json"):
        if name in contents.files:
            try:
                document(contents.folder / name)
            except DamagedFile as error:
                yield error.finding(contents.folder / name)
    config = configuration(contents.folder)
    yield from _components(contents)
    if not contents.parts:
        return
    yield from _empty(contents)
    shapes = {entry.name: entry.whole_shape for entry in contents.weights() if 0 not in entry.whole_shape}
    if not is_whole or not shapes:
        return
    if "peft_type" in config:
        yield from _ranks(contents, config, shapes)
        return
    if "model_type" not in config:
        return
    yield from _wrapped(contents, shapes)
    yield from _quantization(contents, config)
    for text in (config, *(config[name] for name in _NESTED if isinstance(config.get(name), Mapping))):
        yield from _embedding(contents, text, shapes)
    yield from _head(contents, config, shapes)
    yield from _layers(contents, config, shapes)
    yield from _experts(contents, config, shapes)
    yield from _tokens(contents, shapes)


def _components(contents: Contents) -> Iterator[Finding]:
    """Parts of a pipeline of diffusers that have no folder."""
    if "model_index.json" not in contents.files:
        return
    named = document_or_empty(contents.folder / "model_index.json")
    lost = [
        name
        for name, value in named.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if name not in contents.folders
    ]
    if lost:
        message = f"model_index.json names {', '.join(lost[:_MAX_NAMES])}, and there is no such folder"
        yield contents.finding("missing", message, "model_index.json", "warning", "Download the whole pipeline.")


def _empty(contents: Contents) -> Iterator[Finding]:
    """Files of weights without any: an adapter, or a model that was gathered on another rank only."""
    for part in contents.parts:
        is_read = not part.findings and not part.not_read and not part.unchecked
        if is_read and not part.entries and _WEIGHT_FILES.search(part.root.name):
            message = f"{part.root.name} holds no tensors at all"
            remedy = (
                "Save it again from the whole state dict (with ZeRO-3 or FSDP: gathered); a loader changes nothing."
            )
            yield contents.finding("no_values", message, part.root.name, remedy=remedy)


def _ranks(contents: Contents, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
    """The rank of an adapter by its configuration, and by its first factors."""
    rank = config.get("r")
    if config.get("peft_type") != "LORA" or type(rank) is not int or config.get("rank_pattern"):
        return
    odd = {name: shape for name, shape in shapes.items() if _FIRST_FACTOR.search(name) and shape[:1] != (rank,)}
    if odd:
        name, shape = next(iter(odd.items()))
        message = f"{_ADAPTER} says that the rank is {rank}, and {name} is {'x'.join(map(str, shape))}"
        yield contents.finding("config", message, _ADAPTER, remedy=_CONFIG_REMEDY)


def _wrapped(contents: Contents, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
    """Names that begin with what wraps a model in training: a loader of the bare model takes none of them."""
    names = [name for name in shapes if _WRAPPER.search(name)]
    if 2 * len(names) > len(shapes):
        message = f"{len(names)} of {len(shapes)} names have the prefix of a wrapper, such as {names[0]}"
        remedy = (
            "Save the bare model (unwrap_model, model._orig_mod), or remove the prefix: a loader takes none of them."
        )
        yield contents.finding("wrapped_names", message, "config.json", remedy=remedy)


def _quantization(contents: Contents, config: Mapping[str, Any]) -> Iterator[Finding]:
    """A configuration that says that the weights are quantized, and none is."""
    said = config.get("quantization_config")
    method = said.get("quant_method", f"{said.get('bits')} bits") if isinstance(said, Mapping) else None
    if method is None or method in _BY_LOADERS:
        return
    if all(entry.dtype.is_floating_point and entry.dtype.itemsize > 1 for entry in contents.weights()):
        message = f"config.json says that the weights are quantized ({method}), and none of the tensors is"
        remedy = "Remove quantization_config if they were merged or dequantized; else load the quantized weights."
        yield contents.finding("config", message, "config.json", "warning", remedy)


def _embedding(
    contents: Contents, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Finding]:
    rows, width = config.get("vocab_size"), config.get("hidden_size")
    found = {name: shape for name, shape in shapes.items() if _EMBEDDING.search(name) and len(shape) == 2}
    if len({shape for shape in found.values()}) != 1:
        return
    name, shape = next(iter(found.items()))
    if type(rows) is int and shape[0] < rows:
        message = f"config.json says that vocab_size is {rows}, and {name} has {shape[0]} rows"
        yield contents.finding("config", message, "config.json", remedy=_CONFIG_REMEDY)
    if type(width) is int and shape[1] != width and shape[1] not in filter(_is_int, config.values()):
        message = f"config.json says that hidden_size is {width}, and {name} is {shape[1]} wide"
        yield contents.finding("config", message, "config.json", remedy=_CONFIG_REMEDY)


def _head(contents: Contents, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
    """A head of its own that is not there, while the configuration says that it does not share the embedding."""
    tied = config.get("tie_word_embeddings")
    for name in _NESTED:
        nested = config.get(name)
        if isinstance(nested, Mapping) and "tie_word_embeddings" in nested and tied is None:
            tied = nested["tie_word_embeddings"]
    classes = config.get("architectures")
    classes = classes if isinstance(classes, list) else []
    generates = any(_GENERATES.search(str(name)) for name in classes)
    embedding = next(filter(_EMBEDDING.search, shapes), None)
    if tied is False and generates and "lm_head.weight" in shapes and not any(map(_ANY_EMBEDDING.search, shapes)):
        message = "there is a head (lm_head.weight) and no embedding, and config.json says that they are not tied"
        yield contents.finding("missing_embedding", message, "config.json", remedy="Save the model with its embedding.")
    kind = next((str(name) for name in classes if _CLASSIFIES.search(str(name))), "")
    if kind and not any(map(_CLASSIFIER.search, shapes)):
        message = f"config.json says that this is a {kind}, and there is no head for that: it would be random"
        yield contents.finding("missing_head", message, "config.json", remedy="Save the whole model, with its head.")
    if tied is not False or not generates or embedding is None or any(map(_HEAD.search, shapes)):
        return
    message = (
        f"there is no head (lm_head.weight) beside {embedding}, and config.json says that they are not tied: "
        "it would begin with random values"
    )
    remedy = "Set tie_word_embeddings to true if they were, or save the model again with its head."
    yield contents.finding("missing_head", message, "config.json", remedy=remedy)


def _same_layers(stack: str, numbers: set[int], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether nearly all layers of a stack hold the same weights, two or more: else numbers may be left out."""
    kinds = Counter(map(frozenset, _parts(stack, numbers, shapes).values()))
    usual, count = kinds.most_common(1)[0]
    return len(usual) >= _MIN_WEIGHTS and 3 * count >= 2 * len(numbers)


def _parts(stack: str, numbers: set[int], shapes: Mapping[str, tuple[int, ...]]) -> dict[int, set[str]]:
    """Names of the weights of each layer of a stack."""
    parts: dict[int, set[str]] = {number: set() for number in numbers}
    for name in shapes:
        rest = name.removeprefix(f"{stack}.")
        number, dot, part = rest.partition(".")
        if rest != name and dot and number.isdecimal() and len(number) <= 6 and int(number) in parts:
            parts[int(number)].add(part)
    return parts


def _layers(contents: Contents, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
    """Layers that are missing, between others or at the end."""
    stacks = {
        stack: numbers for stack, numbers in _numbers(_LAYER, shapes).items() if _same_layers(stack, numbers, shapes)
    }
    is_text = any(map(_EMBEDDING.search, shapes))
    counts = [config[key] for key in _LAYER_COUNTS if _is_int(config.get(key))]
    nested = [config[name] for name in _NESTED if isinstance(config.get(name), Mapping)]
    counts += [part[key] for part in nested for key in _LAYER_COUNTS if _is_int(part.get(key))]
    for stack, numbers in stacks.items():
        expected = max(numbers) + 1
        if is_text and len(stacks) == 1 and len(counts) == 1:
            expected = max(expected, counts[0])
        lost = sorted(set(range(expected)) - numbers)
        if lost and len(numbers) > 1:
            said = f"config.json says that there are {expected}" if expected > max(numbers) + 1 else "others are there"
            message = f"no weights of layer {_some(lost)} of {stack}.*, and {said}"
            yield contents.finding("missing_layer", message, "config.json", remedy=_CONFIG_REMEDY)
        yield from _incomplete_layer(contents, stack, _parts(stack, numbers, shapes), shapes)


def _incomplete_layer(
    contents: Contents, stack: str, parts: Mapping[int, set[str]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Finding]:
    """One layer without matrices that all others have; the first often differs by design."""
    common = Counter(part for held in parts.values() for part in held)
    everywhere = {part for part, count in common.items() if count == len(parts) - 1 and not _EXPERT.search(part)}
    for number, held in parts.items():
        gone = [part for part in sorted(everywhere - held) if _is_matrix(stack, part, parts, shapes)]
        is_poorer = all(common[part] == len(parts) for part in held)
        if gone and is_poorer and number != min(parts) and len(parts) > 2:
            message = f"layer {number} of {stack}.* lacks {', '.join(gone[:_MIN_WEIGHTS])}, which all others have"
            yield contents.finding("missing_tensor", message, "config.json", remedy=_CONFIG_REMEDY)


def _is_matrix(stack: str, part: str, parts: Mapping[int, set[str]], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return any(len(shapes.get(f"{stack}.{number}.{part}", ())) > 1 for number in parts)


def _experts(contents: Contents, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
    stacks = _numbers(_EXPERT, shapes)
    said = [config[key] for key in _EXPERT_COUNTS if _is_int(config.get(key))]
    expected = max([max(numbers) + 1 for numbers in stacks.values()] + said[:1], default=0)
    wrong = {stack: numbers for stack, numbers in stacks.items() if len(numbers) < expected}
    if wrong:
        stack, numbers = next(iter(wrong.items()))
        message = f"{stack} has {len(numbers)} experts where there should be {expected} (in {len(wrong)} layers)"
        yield contents.finding("missing_expert", message, "config.json", remedy=_CONFIG_REMEDY)


def _numbers(pattern: re.Pattern[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, set[int]]:
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in shapes:
        match = pattern.search(name)
        if match is not None:
            stacks[match["before"]].add(int(match["number"]))
    return stacks


def _tokens(contents: Contents, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
    """Numbers of tokens beyond the rows of the embedding: looking one up fails, or reads other memory on a GPU."""
    found = {shape[0] for name, shape in shapes.items() if _EMBEDDING.search(name) and len(shape) == 2}
    if len(found) != 1 or "tokenizer.json" not in contents.files:
        return
    (rows,) = found
    tokenizer = document_or_empty(contents.folder / "tokenizer.json")
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    numbers = [token.get("id") for token in added if isinstance(token, Mapping)] if isinstance(added, list) else []
    if isinstance(vocabulary, Mapping) and len(vocabulary) <= _MAX_TOKENS:
        numbers += vocabulary.values()
    highest = max((number for number in numbers if isinstance(number, int)), default=-1)
    if highest >= rows:
        message = f"tokenizer.json numbers tokens up to {highest}, and the embedding has {rows} rows"
        remedy = "Resize the embedding before training (resize_token_embeddings), or take the tokenizer of this model."
        yield contents.finding("tokenizer", message, "tokenizer.json", "warning", remedy)


def _is_int(value: Any) -> bool:
    return type(value) is int


def _some(numbers: list[int]) -> str:
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return ", ".join(map(str, numbers[:5])) + more
