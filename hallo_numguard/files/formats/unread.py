"""Files with weights of formats that are not read, recognised by their content and listed; and text in their place."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

from hallo_numguard.files.formats.file_access import file_size, first_bytes
from hallo_numguard.files.formats.source import DamagedFile, Source

_BEGINNING = 512  # bytes that are enough to recognise a format
_MAX_TEXT_BYTES = 1 << 20  # of a page or message that was saved in place of weights
_POINTER = b"version https://git-lfs"
_WEIGHT_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *(
            "bin",
            "ckpt",
            "engine",
            "gguf",
            "h5",
            "keras",
            "mlmodel",
            "model",
            "msgpack",
            "npy",
            "npz",
            "onnx",
            "params",
        ),
        *("pb", "pdparams", "pkl", "plan", "pt", "pt2", "pth", "safetensors", "sft", "tflite"),
    )
)
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "HDF5, as Keras writes it"),
    (b"\xba\x16\x4f\x2f", "fastText"),
    (b"lmgg", "ggml"),
    (b"fmgg", "ggml"),
    (b"tjgg", "ggml"),
    (b"algg", "ggml"),
    (b"ggml", "ggml"),
    (b"Obj\x01", "Avro"),
    (b"ARROW1", "Arrow"),
    (b"PAR1", "Parquet"),
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ", "xz"),
    (b"(\xb5/\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"7z\xbc\xaf", "7-Zip"),
    (b"Rar!", "RAR"),
)
_NAMES = {  # formats without a beginning of their own, by the end of their names
    ".onnx": "ONNX",
    ".onnx_data": "data of ONNX",
    ".onnx.data": "data of ONNX",
    ".ort": "ONNX Runtime",
    ".tflite": "TensorFlow Lite",
    ".msgpack": "Flax",
    ".pb": "TensorFlow",
    ".mlmodel": "Core ML",
    ".engine": "TensorRT",
    ".plan": "TensorRT",
    ".pdparams": "Paddle",
    ".pdmodel": "Paddle",
    ".pdiparams": "Paddle",
    ".rten": "rten",
    ".ot": "tch-rs",
    ".joblib": "joblib",
    ".zarr": "Zarr",
    ".tiktoken": "tiktoken",
    ".nemo": "NeMo",
    ".mar": "TorchServe",
    ".pte": "ExecuTorch",
    ".ptl": "PyTorch Mobile",
}
_TENSORFLOW_DATA = re.compile(r"\.data-\d+-of-\d+$")
_SPEC_NAME = re.compile(rb"[A-Za-z]\w+\0?")
_FETCH = "Fetch the file itself: `git lfs pull` in a clone, or download it from the Hub."
_AGAIN = "Download it again, and check the address, the name of the file and the access rights."


def recognises(path: Path) -> bool:
    """Returns whether the file is a pointer to weights, text in place of weights, or of a format that is not read."""
    if path.is_dir():
        return False
    beginning = first_bytes(path, _BEGINNING)
    return text_in_place(path, beginning) is not None or format_of(path, beginning) is not None


def read(path: Path) -> Source:
    """Returns the name of the format, or the finding that it holds no weights."""
    beginning = first_bytes(path, _BEGINNING)
    text = text_in_place(path, beginning)
    if text is not None:
        return Source("text", path, (path,), findings=(text.finding(path),))
    name = format_of(path, beginning)
    return Source(f"not read: {name}", path, (path,), not_read=(f"{path.name} ({name})",))


def text_in_place(path: Path, beginning: bytes) -> DamagedFile | None:
    """Returns the damage if a file that should hold weights is a git-lfs pointer, a web page or a message."""
    if beginning.startswith(_POINTER):
        size = re.search(rb"size (\d+)", beginning)
        of = f" to {int(size[1][:20]):,} bytes" if size else ""
        return DamagedFile(f"is a git-lfs pointer{of}, not the weights themselves", "pointer", _FETCH)
    if path.suffix not in _WEIGHT_SUFFIXES or file_size(path) > _MAX_TEXT_BYTES:
        return None
    what = _text(beginning.lstrip(b"\xef\xbb\xbf \t\r\n"))
    return None if what is None else DamagedFile(f"is {what}, not weights", "not_weights", _AGAIN)


def _text(beginning: bytes) -> str | None:
    """What kind of page or message a text is."""
    start = beginning[:64].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page (HTML)"
    if start.startswith((b"<?xml", b"<error")):
        return "an XML document, such as the error message of a store"
    if start.startswith((b'{"error', b'{"message', b'{"detail', b'{"code')):
        return "an error message (JSON)"
    if beginning and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in beginning) and b"{" not in beginning:
        return f"a text ({beginning[:40].decode()!r}{' ...' if len(beginning) > 40 else ''})"
    return None


def format_of(path: Path, beginning: bytes) -> str | None:
    """Returns the name of a format that is not read; None for other files."""
    if path.name.endswith(".index") and Path(f"{path.with_suffix('')}.data-00000-of-00001").exists():
        return "TensorFlow"
    by_content = next((name for magic, name in _MAGIC if beginning.startswith(magic)), None)
    by_content = by_content or next((name for name, matches in _CONTENTS.items() if matches(path, beginning)), None)
    if by_content is not None:
        return by_content
    if not beginning:
        return None
    ending = next((end for end in _NAMES if path.name.endswith(end)), "")
    return _NAMES.get(ending) or ("TensorFlow" if _TENSORFLOW_DATA.search(path.name) else None)


def _is_ctranslate2(_: Path, beginning: bytes) -> bool:
    """A version, and the name of a specification behind its length."""
    if len(beginning) < 8:
        return False
    version, length = struct.unpack_from("<IH", beginning)
    return 0 < version < 32 and 0 < length < 100 and _SPEC_NAME.fullmatch(beginning[6 : 6 + length]) is not None


def _is_openvino(path: Path, _: bytes) -> bool:
    """Weights without any header; the description lies beside them."""
    return path.suffix == ".bin" and (
        b"<net" in first_bytes(path.with_suffix(".xml"), _BEGINNING) or path.name.startswith("openvino_")
    )


def _is_onnx(path: Path, beginning: bytes) -> bool:
    """A version of the format, and the name of the program that wrote it."""
    return (
        len(beginning) > 4
        and beginning[0] == 8
        and beginning[1] < 32
        and beginning[2] == 0x12
        and path.suffix in (".bin", ".onnx", ".model")
    )


def _is_tokenizer(path: Path, beginning: bytes) -> bool:
    return path.suffix == ".model" and beginning[:1] == b"\n" and b"<unk>" in beginning[:128]


def _is_pickle(path: Path, beginning: bytes) -> bool:
    """A pickle of no known kind: caches, settings, models of scikit-learn, old weights of numpy arrays."""
    return path.suffix in (".pkl", ".pickle") and beginning[:1] == b"\x80" and beginning[1:2] < b"\x06"


def _is_other_zip(path: Path, beginning: bytes) -> bool:
    if not beginning.startswith(b"PK\x03\x04"):
        return False
    if path.suffix == ".zip" or b"data.pkl" in beginning:
        return path.suffix == ".zip"
    return path.suffix == ".keras" or b".weights.h5" in beginning or path.suffix in (".mlpackage", ".pt2")


def _is_tar(_: Path, beginning: bytes) -> bool:
    return beginning[257:262] == b"ustar"


def _is_flat_buffer(_: Path, beginning: bytes) -> bool:
    return beginning[4:8] in (b"TFL3", b"ET12", b"ORTM", b"PTMF")


_CONTENTS: dict[str, Callable[[Path, bytes], bool]] = {
    "CTranslate2": _is_ctranslate2,
    "OpenVINO": _is_openvino,
    "ONNX": _is_onnx,
    "model of a tokenizer": _is_tokenizer,
    "pickle": _is_pickle,
    "zip": _is_other_zip,
    "tar": _is_tar,
    "TensorFlow Lite, ExecuTorch, ONNX Runtime or PyTorch Mobile": _is_flat_buffer,
}
