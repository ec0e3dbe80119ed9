"""Files that hold no weights, or weights of formats that are not read, beside weights and alone; and GGUF and numpy."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hallo_numguard as ng
from hallo_numguard.files.formats import load, open_source

RAW = bytes(range(1, 256)) * 40
TOKENIZER = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02" + RAW
UNREAD = {
    "openvino/openvino_model.bin": RAW,
    "model.bin": struct.pack("<IH", 6, 9) + b"TestSpec\0" + RAW,
    "ggml-model-f16.bin": b"lmgg" + RAW,
    "fasttext/model.bin": b"\xba\x16\x4f\x2f\x0c\0\0\0" + RAW,
    "onnx/model.onnx": b"\x08\x07\x12\x07pytorch" + RAW,
    "onnx/model.onnx_data": RAW,
    "flax_model.msgpack": b"\x81\xa6params" + RAW,
    "tf_model.h5": b"\x89HDF\r\n\x1a\n" + RAW,
    "saved_model.pb": b"\x08\x01" + RAW,
    "model.tflite": b"\x1c\0\0\0TFL3" + RAW,
    "tokenizer.model": TOKENIZER,
    "cache.pkl": pickle.dumps({"a": 1}),
    "weights.zip": b"PK\x03\x04" + b"\0" * 22 + b"\x06\0\0\0" + b"a.pt" + b"archive/data.pkl" + RAW,
    "archive.tar": b"\0" * 257 + b"ustar" + RAW,
}


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_listed_beside_weights_and_could_not_be_checked_alone(tmp_path: Path, name: str) -> None:
    path = put(tmp_path / name, UNREAD[name])
    alone = ng.scan(path)
    assert (alone.findings, alone.exit_code) == ((), 2)
    save_file({"weight": torch.rand(4, 4)}, tmp_path / "model.safetensors")
    beside = ng.scan(tmp_path)
    assert (beside.findings, beside.exit_code) == ((), 0)
    assert [Path(name).name in sentence for sentence in beside.not_read] == [True]
    save_file({"weight": torch.full((4, 4), float("nan"))}, tmp_path / "model.safetensors")
    assert ng.scan(tmp_path).exit_code == 1


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"5" * 64 + b"\nsize 90868376\n"
TEXTS = {
    POINTER: "git-lfs pointer to 90,868,376 bytes",
    b"<!DOCTYPE html><html><body>Sign in</body></html>": "a web page",
    b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>": "an XML document",
    b'{"error": "Repository not found"}': "an error message",
    b"Entry not found": "a text ('Entry not found')",
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "a.pt", "b.ckpt", "c.gguf", "model.onnx"])
@pytest.mark.parametrize("text", TEXTS, ids=["pointer", "html", "xml", "json", "words"])
def test_text_in_place_of_weights_is_named(tmp_path: Path, name: str, text: bytes) -> None:
    report = ng.scan(put(tmp_path / name, text))
    assert report.exit_code == 1
    (finding,) = report.findings
    assert TEXTS[text] in finding.message
    assert finding.remedy


def gguf(tensors: dict[str, tuple[int, tuple[int, ...], bytes]], alignment: int = 32) -> bytes:
    """Returns a GGUF file of tensors given by type, shape and bytes."""

    def name(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 3)
    head += name("general.architecture") + struct.pack("<I", 8) + name("llama")
    head += name("general.alignment") + struct.pack("<II", 4, alignment)
    head += name("tokenizer.tokens") + struct.pack("<IIQ", 9, 8, 2) + name("a") + name("b")
    data = b""
    for key, (kind, shape, content) in tensors.items():
        head += name(key) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % alignment)
    return head + bytes(-len(head) % alignment) + data


def q8(bad: bool = False) -> bytes:
    scale = struct.pack("<e", float("inf") if bad else 0.01)
    return (struct.pack("<e", 0.01) + bytes(range(32))) * 7 + scale + bytes(range(32))


def test_gguf_is_read_with_the_scales_in_its_blocks(tmp_path: Path) -> None:
    matrix = torch.rand(4, 8)
    content = {"a": (0, (4, 8), matrix.numpy().tobytes()), "b": (8, (8, 32), q8())}
    path = put(tmp_path / "model.gguf", gguf(content))
    entries = {entry.name: entry for entry in open_source(path).entries}
    assert torch.equal(load(entries["a"]), matrix)
    assert ng.scan(path).exit_code == 0
    put(path, gguf({**content, "b": (8, (8, 32), q8(bad=True))}))
    assert "1 of 8 blocks of b" in ng.scan(path).findings[0].message
    matrix[1, 2] = float("nan")
    put(path, gguf({**content, "a": (0, (4, 8), matrix.numpy().tobytes())}))
    assert ng.scan(path).findings[0].offender.index == (1, 2)


def test_a_gguf_file_that_is_cut_anywhere_is_reported(tmp_path: Path) -> None:
    whole = gguf({"a": (0, (4, 8), torch.rand(4, 8).numpy().tobytes())})
    for size in range(len(whole)):
        assert open_source(put(tmp_path / "a.gguf", whole[:size])).findings, size


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_arrays_of_numpy_are_read(tmp_path: Path, name: str) -> None:
    for value, expected in ((1.0, 0), (np.nan, 1)):
        array = np.asfortranarray(np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32))
        array[2, 3] = value
        with (tmp_path / name).open("wb") as file:
            np.save(file, array) if name == "a.npy" else np.savez(file, weight=array)
        report = ng.scan(tmp_path / name)
        assert report.exit_code == expected
    assert report.findings[0].offender.index == (2, 3)


def test_safetensors_under_other_names_and_other_files_under_its_name(tmp_path: Path) -> None:
    save_file({"weight": torch.full((2, 2), float("nan"))}, tmp_path / "flux.sft")
    save_file({"weight": torch.full((2, 2), float("nan"))}, tmp_path / "weights")
    assert [Path(finding.file).name for finding in ng.scan(tmp_path).findings] == ["flux.sft", "weights"]
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "is an archive, as of torch.save" in ng.scan(tmp_path / "model.safetensors").findings[0].message


RARE = (torch.float8_e4m3fnuz, torch.float8_e8m0fnu, torch.complex64)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, dtype) for name in ("a.safetensors", "a.pt") for dtype in RARE), ("a.pt", torch.complex128)],
)
def test_rare_types_are_read(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    for bad in (False, True):
        values = torch.rand(3, 4).to(dtype)
        if bad:
            values[1, 2] = torch.tensor(float("nan")).to(dtype)
        if name == "a.pt":
            torch.save({"weight": values}, tmp_path / name)
        else:
            save_file({"weight": values}, tmp_path / name)
        report = ng.scan(tmp_path / name)
        assert report.exit_code == bad
    assert report.findings[0].offender.index == (1, 2)


def test_four_bit_floats_are_read(tmp_path: Path) -> None:
    values = torch.randint(0, 255, (8, 8), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file({"layer.weight": values, "layer.weight_scale": torch.rand(8, 1) + 1}, tmp_path / "a.safetensors")
    report = ng.scan(tmp_path / "a.safetensors")
    assert (report.exit_code, report.unchecked) == (0, ())
    assert "2 tensors of floats" in report.checked[0]
