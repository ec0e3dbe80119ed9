"""Manifests: real sha256sum, md5sum, git and model-signing are the judges; every kind of defect is planted."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonschema
import pytest
import torch
from click.testing import CliRunner
from google.protobuf.json_format import MessageToDict
from huggingface_hub._local_folder import write_download_metadata
from hypothesis import given
from hypothesis import strategies as st
from model_signing import hashing
from model_signing._signing import signing
from safetensors.torch import save_file

import hallo_numguard as ng
from hallo_numguard.cli import main
from hallo_numguard.files.manifest import listing, statement
from hallo_numguard.files.manifest import signing as signatures
from hallo_numguard.files.manifest.changes import changes
from hallo_numguard.files.manifest.listing import DamagedManifest

from paths import ROOT
from weights import QUERY, copy_of_weights, flip_bit, overwrite, place_of

DOCS = ROOT / "docs"
MANIFEST, TENSORS = "numguard.manifest.json", "numguard.tensors.json"
HOSTILE = (
    "new\nline",
    "back\\slash",
    "carriage\rreturn",
    "\\",
    " two  spaces ",
    "*star",
    "-dash",
    "<script>alert(1)<script>",
    "\x1b]0;owned\x07\x1b[2J",
    "[bold][red]",
    "\u202etxt.exe",
    "ünï",
    b"\xff\xfe".decode(errors="surrogateescape"),
)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.0.weight": torch.randn(16, 24, generator=generator),
        "layer.0.bias": torch.randn(24, generator=generator).half(),
        "steps": torch.arange(5),
    }


@pytest.fixture
def model(tmp_path):
    """A folder with weights in a subfolder, without a manifest."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file(tensors(), folder / "sub" / "weights.safetensors")
    (folder / "config.json").write_text('{"hidden": 24}')
    (folder / "sub.txt").write_text("sorts after sub/, as a path, before it as text")
    return folder


@pytest.fixture
def listed(model):
    """The same with a manifest."""
    assert ng.write_manifest(model).ok
    return model


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)), env={"COLUMNS": "300"})


def tool(name, *arguments, cwd):
    return subprocess.run([name, *arguments], cwd=cwd, capture_output=True, check=False)


def kinds(report):
    return [finding.kind for finding in report.findings]


def the(kind, report):
    (finding,) = (finding for finding in report.findings if finding.kind == kind)
    return finding


# -- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("judge", "name"), [("sha256sum", "SHA256SUMS"), ("md5sum", "MD5SUMS")])
def test_coreutils_accept_the_lists_and_find_what_was_changed(model, judge, name):
    assert ng.write_manifest(model, md5=True).ok
    done = tool(judge, "--strict", "-c", name, cwd=model)
    assert (done.returncode, done.stdout.count(b": OK")) == (0, 4)
    flip_bit(model / "config.json", 3, 0)
    done = tool(judge, "--strict", "-c", name, cwd=model)
    assert done.returncode == 1
    assert b"config.json: FAILED" in done.stdout


def test_no_md5_is_written_unless_asked_but_one_that_is_there_is_kept_right(listed):
    assert not (listed / "MD5SUMS").exists()
    ng.write_manifest(listed, md5=True)
    (listed / "config.json").write_text("{}")
    ng.write_manifest(listed)
    assert tool("md5sum", "--strict", "-c", "MD5SUMS", cwd=listed).returncode == 0


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_survive_a_round_trip(model, name):
    (model / name).write_bytes(os.fsencode(name))
    assert ng.write_manifest(model, md5=True).ok
    for judge, sums in (("sha256sum", "SHA256SUMS"), ("md5sum", "MD5SUMS")):
        done = tool(judge, "--strict", "-c", sums, cwd=model)
        assert done.returncode == 0, done.stderr
    assert ng.verify_manifest(model).ok
    flip_bit(model / name, 0, 0)
    assert the("changed_file", ng.verify_manifest(model)).file == name
    done = run("verify", model)
    assert done.exit_code == 1
    assert not any(character in done.stdout for character in "\x1b\r\u202e\x07\udcff")
    assert json.loads(run("verify", model, "--format", "json").stdout)["findings"][0]["file"] == name


@given(st.text(st.characters(exclude_characters="\0/"), min_size=1).filter(lambda name: name not in (".", "..")))
def test_any_name_survives_a_round_trip_through_a_list(name):
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return  # no file can be called so
    digests = {f"x{name}": "0" * 64}
    assert listing.read_checksums(listing.write_checksums(digests), "SHA256SUMS").digests == digests


def test_the_statement_is_the_one_that_model_signing_makes(listed):
    ours = json.loads((listed / MANIFEST).read_bytes())
    ignored = ours["predicate"]["serialization"]["ignore_paths"]
    theirs = hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False).hash(listed)
    expected = MessageToDict(signing.Payload(theirs).statement.pb)
    for document in (ours, expected):
        document["predicate"]["serialization"]["ignore_paths"].sort()  # theirs are a set
    assert ours == expected
    names = [item["name"] for item in ours["predicate"]["resources"]]
    assert names == ["config.json", TENSORS, "sub/weights.safetensors", "sub.txt"]
    assert signing.dsse_payload_to_manifest(ours) == theirs


def test_every_tensor_is_written_down_with_its_digest_and_its_record(listed):
    document = json.loads((listed / TENSORS).read_bytes())
    schema = json.loads((DOCS / "manifest.schema.json").read_text())
    assert schema["$defs"]["tensor"]["required"] == [field.name for field in dataclasses.fields(statement.TensorFacts)]
    check = jsonschema.Draft202012Validator(schema)
    check.validate(document)
    (file,) = (file for file in document["predicate"]["files"] if file["tensors"])
    found = {tensor["name"]: tensor for tensor in file["tensors"]}
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name]["digest"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert found[name]["shape"] == list(tensor.shape)
        assert found[name]["dtype"] == str(tensor.dtype).removeprefix("torch.")
    record = found["layer.0.weight"]["record"]
    assert record["absmax"] == tensors()["layer.0.weight"].abs().max().item()
    assert found["steps"]["record"] is None
    for change in ({"schema_version": 2}, {"files": [{"name": 3}]}, {"more": 1}):
        assert not check.is_valid({**document, "predicate": {**document["predicate"], **change}})


def test_what_is_not_finite_is_written_down_and_no_matter(model):
    save_file({"bad": torch.tensor([1.0, float("nan"), float("-inf")])}, model / "bad.safetensors")
    assert ng.write_manifest(model).ok
    assert ng.verify_manifest(model).ok
    contents = statement.read_contents((model / TENSORS).read_bytes())
    record = contents.files["bad.safetensors"].tensors[0].record
    assert (record.nan, record.neg_inf, record.first_nonfinite, record.absmax) == (1, 1, 1, 1.0)


def test_a_manifest_lists_neither_itself_nor_signatures_nor_what_git_keeps(listed):
    (listed / "model.sig").write_text("")
    (listed / ".git").mkdir()
    (listed / ".git" / "HEAD").write_text("ref")
    assert ng.verify_manifest(listed).ok
    ng.write_manifest(listed, md5=True)
    text = (listed / MANIFEST).read_text() + (listed / "SHA256SUMS").read_text() + (listed / "MD5SUMS").read_text()
    assert text.count(".git/") + text.count("model.sig") == 0
    assert ng.verify_manifest(listed).ok


def test_the_same_files_give_the_same_bytes(listed):
    before = {name: (listed / name).read_bytes() for name in (MANIFEST, TENSORS, "SHA256SUMS")}
    ng.write_manifest(listed)
    assert {name: (listed / name).read_bytes() for name in before} == before


# -- what is refused -------------------------------------------------------------------------------------------------


def escape(model):
    (model / "weights.bin").symlink_to("/etc/passwd")


def escape_by_folder(model):
    (model / "more").symlink_to("/etc")


def broken_link(model):
    (model / "gone.bin").symlink_to("nowhere")


def pipe(model):
    os.mkfifo(model / "pipe")


def case(model):
    (model / "Config.json").write_text("{}")


REFUSED = {
    "link_outside": escape,
    "bad_link": escape_by_folder,
    "bad_link ": broken_link,
    "special_file": pipe,
    "same_but_for_case": case,
}


@pytest.mark.parametrize(("kind", "plant"), REFUSED.items())
def test_a_folder_that_cannot_be_listed_whole_gets_no_manifest(model, kind, plant):
    plant(model)
    report = ng.write_manifest(model)
    assert report.exit_code == 1
    assert kinds(report) == [kind.strip()]
    assert report.unchecked
    assert not (model / MANIFEST).exists()
    assert not (model / "SHA256SUMS").exists()


@pytest.mark.parametrize(("kind", "plant"), REFUSED.items())
def test_what_could_not_have_been_listed_is_found_later(listed, kind, plant):
    plant(listed)
    report = ng.verify_manifest(listed)
    assert kind.strip() in kinds(report)
    assert report.exit_code == 1


@contextlib.contextmanager
def unprivileged():
    """Runs as a user who may read only what everybody may."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def test_a_file_that_may_not_be_read_is_a_finding():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for name in ("secret", "open"):
            Path(folder, name).write_text(name)
        assert ng.write_manifest(folder).ok
        assert ng.verify_manifest(folder).ok
        before = Path(folder, MANIFEST).read_bytes()
        Path(folder, "secret").chmod(0)
        with unprivileged():
            reports = ng.write_manifest(folder), ng.verify_manifest(folder)
        for report in reports:
            (finding,) = report.findings
            assert (finding.file, finding.severity, report.exit_code) == ("secret", "error", 1)
            assert "Permission denied" in finding.message
        assert Path(folder, MANIFEST).read_bytes() == before


def test_a_manifest_that_cannot_be_written_is_an_error(model):
    (model / "SHA256SUMS").mkdir()
    done = run("manifest", model)
    assert done.exit_code == 2
    assert "SHA256SUMS" in done.stderr
    assert not (model / MANIFEST).exists()


def test_a_link_that_stays_inside_is_followed(model):
    (model / "alias.safetensors").symlink_to("sub/weights.safetensors")
    assert ng.write_manifest(model).ok
    assert ng.verify_manifest(model).ok
    assert json.loads((model / MANIFEST).read_bytes())["predicate"]["serialization"]["allow_symlinks"] is True


def test_a_file_replaced_by_a_link_out_of_the_folder_is_missing_and_never_opened(listed, tmp_path):
    outside = shutil.copy(listed / "config.json", tmp_path / "outside.json")
    (listed / "config.json").unlink()
    (listed / "config.json").symlink_to(outside)
    assert set(kinds(ng.verify_manifest(listed))) == {"link_outside", "missing_file"}


def test_weights_that_no_reader_understands_are_listed_with_a_warning(model):
    (model / "cut.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{")
    report = ng.write_manifest(model)
    assert "warning" in {finding.severity for finding in report.findings}
    assert tool("sha256sum", "--strict", "-c", "SHA256SUMS", cwd=model).returncode == 0
    assert ng.verify_manifest(model).ok


@pytest.mark.parametrize("command", ["manifest", "verify"])
def test_what_is_no_folder_cannot_be_checked(tmp_path, command):
    (tmp_path / "file").write_text("")
    done = run(command, tmp_path / "file")
    assert (done.exit_code, done.stdout) == (2, "")


# -- what has become of files ----------------------------------------------------------------------------------------


def test_an_intact_folder_is_clean_wherever_it_is(listed, tmp_path):
    moved = listed.rename(tmp_path / "another name")
    report = ng.verify_manifest(moved)
    assert (report.findings, report.exit_code) == ((), 0)
    assert run("verify", moved).exit_code == 0


def test_missing_extra_and_changed_are_told_apart(listed):
    (listed / "sub.txt").unlink()
    (listed / "extra.py").write_text("import os")
    flip_bit(listed / "config.json", 2, 0)
    report = ng.verify_manifest(listed)
    found = {finding.kind: finding.file for finding in report.findings}
    assert found == {"missing_file": "sub.txt", "changed_file": "config.json", "extra_file": "extra.py"}
    assert report.exit_code == 1
    done = run("verify", listed)
    assert done.exit_code == 1
    assert all(name in done.stdout for name in ("sub.txt", "extra.py", "config.json"))


def test_a_renamed_file_is_recognised(listed):
    (listed / "sub.txt").rename(listed / "other.txt")
    finding = the("missing_file", ng.verify_manifest(listed))
    assert "other.txt" in finding.message
    assert "other.txt" in finding.remedy


@pytest.mark.parametrize("bit", [0, 30])
def test_one_flipped_bit_names_the_tensor(tmp_path, bit):
    path = copy_of_weights(tmp_path)
    assert ng.write_manifest(tmp_path).ok
    flip_bit(path, place_of(path, QUERY)[0] + 4 * 1234, bit)
    report = ng.verify_manifest(tmp_path)
    assert kinds(report) == ["changed_file", "changed_tensor"]
    finding = the("changed_tensor", report)
    assert finding.name == QUERY
    assert ("values look alike" in finding.message) == (bit == 0)
    assert ("absmax 0.436084" in finding.message) == (bit == 30)


def test_a_planted_nan_is_counted_and_a_zeroed_run_seen_in_the_norm(tmp_path):
    path = copy_of_weights(tmp_path)
    ng.write_manifest(tmp_path)
    place = place_of(path, QUERY)[0]
    overwrite(path, place, struct.pack("<2f", float("nan"), float("inf")))
    overwrite(path, place + 4096, bytes(4096))
    message = the("changed_tensor", ng.verify_manifest(tmp_path)).message
    assert "non-finite none before and 1 NaN, 1 +Inf now" in message
    assert "norm 31.386" in message


def test_a_truncated_file_says_how_much_is_gone(listed):
    path = listed / "sub" / "weights.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    report = ng.verify_manifest(listed)
    assert "100 bytes fewer" in the("changed_size", report).message
    assert {"changed_file", "missing_tensor"} <= set(kinds(report))


def test_a_file_that_was_written_anew_says_which_tensors_are_others(listed):
    changed = {**tensors(), "more": torch.ones(2)}
    changed["layer.0.weight"] = changed["layer.0.weight"].reshape(24, 16)
    changed["layer.0.bias"] = changed["layer.0.bias"].float()
    del changed["steps"]
    save_file(changed, listed / "sub" / "weights.safetensors")
    report = ng.verify_manifest(listed)
    said = {(finding.kind, finding.name): finding.message for finding in report.findings if finding.name}
    assert "was 16x24 and is 24x16" in said["changed_tensor", "layer.0.weight"]
    assert "was float16 and is float32" in said["changed_tensor", "layer.0.bias"]
    assert said.keys() == {
        ("changed_tensor", "layer.0.weight"),
        ("changed_tensor", "layer.0.bias"),
        ("missing_tensor", "steps"),
        ("extra_tensor", "more"),
    }


def test_files_of_torch_save_are_told_apart_by_tensor(model):
    path = model / "state.pt"
    torch.save({"first": torch.ones(300), "second": torch.full((300,), 2.0)}, path)
    assert ng.write_manifest(model).ok
    data = path.read_bytes()
    overwrite(path, data.index(struct.pack("<f", 2.0) * 300) + 40, struct.pack("<f", 3.0))
    finding = the("changed_tensor", ng.verify_manifest(model))
    assert (finding.name, finding.file) == ("second", "state.pt")
    assert "absmax 2 before and 3 now" in finding.message


# -- manifests that are no good --------------------------------------------------------------------------------------


def rewritten(path, change):
    """Writes a statement anew with one thing changed."""
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(json.dumps(document, indent=1).encode() + b"\n")


def leaves(value, way=()):
    """Every place in a JSON document that holds no other."""
    if isinstance(value, (dict, list)) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*way, key))
    else:
        yield way


def altered(value):
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    return not value if isinstance(value, bool) else [1] if isinstance(value, list) else (value or 0) + 1


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_no_field_can_be_altered(listed, name):
    whole = (listed / name).read_bytes()
    ways = list(leaves(json.loads(whole)))
    assert len(ways) > 20
    for way in ways:
        document = json.loads(whole)
        holder = document
        for key in way[:-1]:
            holder = holder[key]
        holder[way[-1]] = altered(holder[way[-1]])
        (listed / name).write_bytes(json.dumps(document, indent=1 if name == MANIFEST else None).encode() + b"\n")
        assert ng.verify_manifest(listed).exit_code == 1, way
    (listed / name).write_bytes(whole)
    assert ng.verify_manifest(listed).ok


@pytest.mark.parametrize("name", [MANIFEST, "SHA256SUMS"])
def test_no_byte_can_be_altered(listed, name):
    whole = (listed / name).read_bytes()
    for position in range(0, len(whole), 5):
        flip_bit(listed / name, position, position % 7)
        assert ng.verify_manifest(listed).exit_code == 1, position
        (listed / name).write_bytes(whole)


DAMAGED = {
    "empty": b"",
    "not_json": b"PK\x03\x04",
    "a_list": b"[1, 2]",
    "a_number": b"3",
    "deep": b"[" * 100_000,
    "deep_object": b'{"a":' * 100_000,
    "not_utf8": b'{"_type": "\xff"}',
    "of_another_kind": b'{"predicateType": "https://slsa.dev/provenance/v1"}',
    "without_fields": b'{"predicateType": "https://model_signing/signature/v1.0"}',
    "with_null": b'{"predicateType": "https://model_signing/signature/v1.0", "subject": null, "predicate": null}',
    "endless_number": b'{"predicateType": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_manifest_is_a_finding(listed, data):
    (listed / MANIFEST).write_bytes(data)
    report = ng.verify_manifest(listed)
    assert (kinds(report), report.exit_code) == (["damaged_manifest"], 1)
    assert len(report.findings[0].message) < 1000
    with pytest.raises(DamagedManifest):
        statement.read_contents(data)


def test_a_damaged_statement_about_tensors_is_a_changed_file(listed):
    (listed / TENSORS).write_bytes(DAMAGED["without_fields"])
    report = ng.verify_manifest(listed)
    assert (kinds(report), report.exit_code) == (["changed_file"], 1)


def test_a_later_schema_version_is_named(listed):
    document = json.loads((listed / TENSORS).read_bytes())
    document["predicate"]["schema_version"] = 99
    with pytest.raises(DamagedManifest, match="schema version 99; this version reads 1"):
        statement.read_contents(json.dumps(document).encode())


def test_a_manifest_larger_than_any_is_not_read(listed):
    with (listed / MANIFEST).open("r+b") as file:
        file.truncate(listing.MAX_MANIFEST_BYTES + 1)
    assert "larger than 256 MiB" in the("damaged_manifest", ng.verify_manifest(listed)).message


def test_a_manifest_that_is_a_pipe_or_a_folder_is_not_opened(listed):
    (listed / MANIFEST).unlink()
    os.mkfifo(listed / MANIFEST)
    assert kinds(ng.verify_manifest(listed)) == ["damaged_manifest"]
    (listed / MANIFEST).unlink()
    (listed / MANIFEST).mkdir()
    assert kinds(ng.verify_manifest(listed)) == ["damaged_manifest"]


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/../../b", "a//b", "./a", "", "nul\0", MANIFEST, "x.sig"]
)
def test_names_that_lead_elsewhere_are_refused(listed, name):
    def forge(document):
        resources = document["predicate"]["resources"]
        resources.append({"name": name, "algorithm": "sha256", "digest": "0" * 64})
        resources.sort(key=lambda item: item["name"].split("/"))
        raw = b"".join(bytes.fromhex(item["digest"]) for item in resources)
        document["subject"][0]["digest"]["sha256"] = hashlib.sha256(raw).hexdigest()

    (listed / "SHA256SUMS").unlink()
    rewritten(listed / MANIFEST, forge)
    report = ng.verify_manifest(listed)
    assert the("bad_name", report).file == name
    assert report.exit_code == 1


def test_lists_that_disagree_are_a_finding(listed):
    (listed / "SHA256SUMS").write_text("0" * 64 + "  config.json\n")
    assert "should say the same" in the("damaged_manifest", ng.verify_manifest(listed)).message


BAD_LISTS = {
    "no_digest": "config.json\n",
    "short_digest": "abc  config.json\n",
    "odd_digest": "a" * 33 + "  config.json\n",
    "one_space": "0" * 64 + " config.json\n",
    "bad_escape": "\\" + "0" * 64 + "  a\\tb\n",
    "two_kinds": "0" * 64 + "  a\n" + "0" * 32 + "  b\n",
    "two_digests": "0" * 64 + "  a\n" + "1" * 64 + "  a\n",
    "tag_and_digest_differ": "SHA256 (a) = " + "0" * 32 + "\n",
    "nothing": "# only a comment\n",
}


@pytest.mark.parametrize("text", BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_damaged_list_is_a_finding(model, text):
    (model / "SHA256SUMS").write_text(text)
    report = ng.verify_manifest(model)
    assert (kinds(report), report.exit_code) == (["damaged_manifest"], 1)


# -- killed while writing --------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from hallo_numguard.files.manifest.write import write_manifest
from hallo_numguard.files.manifest.verify import verify_manifest
import hallo_numguard.files.manifest.facts

folder, names = Path(sys.argv[1]), sys.argv[2:]
random.seed(0)
texts = ("{}", '{"another": 1}')

def forked(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child

def written(text):
    (folder / "config.json").write_text(text)
    write_manifest(folder)

states = []
for text in texts:
    os.waitpid(forked(lambda: written(text)), 0)
    states.append({name: (folder / name).read_bytes() for name in names})
assert all(states[0][name] != states[1][name] for name in names)

def toggle():
    while True:
        for text in texts:
            written(text)

seen = set()
kills = 0
while kills < 60 or (len(seen) == 1 and kills < 1000):  # a slow machine needs longer to have written anything
    child = forked(toggle)
    time.sleep(random.uniform(0.0, 0.06) * (1 + kills / 60))
    kills += 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        assert found[name] in (states[0][name], states[1][name]), name
    seen.add(tuple(found[name] == states[0][name] for name in names))
os.waitpid(forked(lambda: written(texts[0])), 0)
assert verify_manifest(folder).exit_code == 0
print(len(seen))
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_every_file_old_or_new(listed):
    command = [sys.executable, "-c", KILLED, str(listed), TENSORS, "SHA256SUMS", MANIFEST]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1  # states of the three files that were seen: it was killed at several moments


def test_a_full_disk_leaves_the_old_manifest(listed, monkeypatch):
    before = {name: (listed / name).read_bytes() for name in (MANIFEST, TENSORS, "SHA256SUMS")}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (listed / "config.json").write_text("{}")
    done = run("manifest", listed)
    assert done.exit_code == 2
    assert "No space left" in done.stderr
    assert {name: (listed / name).read_bytes() for name in before} == before


def test_what_a_killed_writer_left_is_named_and_no_harm(listed):
    (listed / f".{MANIFEST}.123.0123abcd").write_text("half")
    report = ng.verify_manifest(listed)
    assert kinds(report) == ["leftover"]
    assert report.exit_code == 0


# -- lists of others -------------------------------------------------------------------------------------------------

TOOLS = {
    "sha256sum": ("SHA256SUMS", ["sha256sum"]),
    "binary": ("SHA256SUMS", ["sha256sum", "-b"]),
    "tagged": ("SHA256SUMS", ["sha256sum", "--tag"]),
    "md5sum": ("MD5SUMS", ["md5sum"]),
    "md5_tagged": ("MD5SUMS", ["md5sum", "--tag"]),
    "sha512sum": ("SHA512SUMS", ["sha512sum"]),
    "sha1sum": ("SHA1SUMS", ["sha1sum"]),
    "another_name": ("sha256sums.txt", ["sha256sum"]),
}


@pytest.mark.parametrize(("name", "command"), TOOLS.values(), ids=TOOLS)
def test_lists_that_coreutils_wrote_are_read(model, name, command):
    for odd in ("new\nline", "back\\slash"):
        (model / odd).write_text(odd)
    done = tool(*command, "./config.json", "sub/weights.safetensors", "new\nline", "back\\slash", cwd=model)
    (model / name).write_bytes(b"# a comment\n\n" + done.stdout)
    report = ng.verify_manifest(model)
    assert report.exit_code == 0
    assert {(finding.kind, finding.file, finding.severity) for finding in report.findings} == {
        ("extra_file", "sub.txt", "info"),
        *([] if name in ("SHA256SUMS", "MD5SUMS") else [("extra_file", name, "info")]),
    }
    flip_bit(model / "new\nline", 0, 0)
    (model / "sub" / "weights.safetensors").unlink()
    found = {finding.kind: finding.file for finding in ng.verify_manifest(model).findings if finding.severity != "info"}
    assert found == {"changed_file": "new\nline", "missing_file": "sub/weights.safetensors"}


def test_a_list_of_everything_that_find_found_is_read(model):
    (model / ".git").mkdir()
    (model / ".git" / "HEAD").write_text("ref")
    (model / "weights.sig").write_text("signature")
    command = "find . -type f ! -name SHA256SUMS -exec sha256sum {} + > SHA256SUMS"
    subprocess.run(command, shell=True, cwd=model, check=True)
    assert ng.verify_manifest(model).findings == ()
    for name in (".git/HEAD", "weights.sig"):
        flip_bit(model / name, 0, 0)
    changed = [finding.file for finding in ng.verify_manifest(model).findings]
    assert changed == [".git/HEAD", "weights.sig"]


@pytest.mark.parametrize("read", [statement.read_contents, lambda data: statement.read_files(data, MANIFEST)])
@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_read_or_refused(read, data):
    with contextlib.suppress(DamagedManifest):
        listing.read_checksums(data, "SHA256SUMS")
    with pytest.raises(DamagedManifest):
        read(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.data())
def test_a_statement_with_anything_in_any_place_is_read_or_refused(data):
    record = {"nan": 0, "pos_inf": 0, "neg_inf": 0, "absmax": 1.0, "sumsq": 1.0, "first_nonfinite": -1}
    tensor = {"name": "x", "role": "parameter", "rank": None, "start": 0, "corner": None, "dtype": "float32"}
    tensor |= {"shape": [1], "digest": "0" * 64, "record": record}
    files = {"schema_version": 1, "files": [{"name": "f", "size": 4, "tensors": [tensor]}]}
    document = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "m", "digest": {"sha256": "0" * 64}}],
        "predicateType": statement.TENSORS_PREDICATE,
        "predicate": files,
    }
    assert statement.read_contents(json.dumps(document).encode() + b"\n").files["f"].tensors[0].name == "x"
    way = data.draw(
        st.sampled_from([*leaves(document), ("subject",), ("predicate", "files"), ("predicate", "files", 0)])
    )
    holder = document
    for key in way[:-1]:
        holder = holder[key]
    holder[way[-1]] = data.draw(JSON)
    with contextlib.suppress(DamagedManifest):
        contents = statement.read_contents(json.dumps(document).encode() + b"\n")
        for file in contents.files.values():
            assert list(changes("f", file, file)) == []


def test_a_list_that_lies_elsewhere_can_be_named(listed, tmp_path):
    kept = (listed / MANIFEST).rename(tmp_path / "kept.json")
    (listed / "SHA256SUMS").unlink()
    assert run("verify", listed, "--manifest", kept).exit_code == 0
    assert run("verify", listed).exit_code == 2
    flip_bit(listed / "config.json", 2, 0)
    assert the("changed_file", ng.verify_manifest(listed, kept)).file == "config.json"


# -- the Hugging Face cache ------------------------------------------------------------------------------------------


def test_digests_of_the_hub_are_compared_where_a_download_left_them(model):
    weights = hashlib.sha256((model / "sub" / "weights.safetensors").read_bytes()).hexdigest()
    config = tool("git", "hash-object", "config.json", cwd=model).stdout.decode().strip()
    for name, etag in (("sub/weights.safetensors", weights), ("config.json", config), ("sub.txt", "W/strange")):
        write_download_metadata(model, name, commit_hash="0" * 40, etag=etag)
    report = ng.verify_manifest(model)
    assert (report.findings, report.exit_code) == ((), 0)
    for name in ("sub/weights.safetensors", "config.json"):
        flip_bit(model / name, 9, 0)
    found = ng.verify_manifest(model).findings
    assert [(finding.kind, finding.file) for finding in found] == [
        ("hub_mismatch", "config.json"),
        ("hub_mismatch", "sub/weights.safetensors"),
    ]
    ng.write_manifest(model)
    report = ng.verify_manifest(model)  # whoever wrote the manifest meant it so
    assert (report.exit_code, {finding.severity for finding in report.findings}) == (0, {"info"})


@pytest.fixture
def snapshot(model, tmp_path):
    """A model as the cache of the Hub keeps it: links to blobs that are called by their sha256."""
    folder = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--org--name" / "blobs"
    (folder / "sub").mkdir(parents=True)
    blobs.mkdir()
    for name, up in (("config.json", "../.."), ("sub/weights.safetensors", "../../..")):
        blob = hashlib.sha256((model / name).read_bytes()).hexdigest()
        shutil.copy(model / name, blobs / blob)
        (folder / name).symlink_to(Path(up, "blobs", blob))
    return folder


def test_a_snapshot_of_the_hub_is_compared_with_the_names_of_its_blobs(snapshot):
    report = ng.verify_manifest(snapshot)
    assert (report.findings, report.exit_code) == ((), 0)
    flip_bit(snapshot / "sub" / "weights.safetensors", 200, 0)
    finding = the("hub_mismatch", ng.verify_manifest(snapshot))
    assert (finding.file, finding.severity) == ("sub/weights.safetensors", "error")


def test_a_snapshot_of_the_hub_gets_a_manifest(snapshot):
    assert ng.write_manifest(snapshot).ok
    contents = statement.read_contents((snapshot / TENSORS).read_bytes())
    assert len(contents.files["sub/weights.safetensors"].tensors) == 3
    assert ng.verify_manifest(snapshot).ok
    flip_bit(snapshot / "sub" / "weights.safetensors", -1 + (snapshot / "config.json").stat().st_size + 200, 0)
    assert "changed_file" in kinds(ng.verify_manifest(snapshot))


def test_a_link_to_other_places_of_the_cache_is_refused(snapshot, tmp_path):
    (tmp_path / "models--org--name" / "secret").write_text("")
    (snapshot / "more").symlink_to("../../secret")
    assert kinds(ng.write_manifest(snapshot)) == ["link_outside"]


# -- signatures ------------------------------------------------------------------------------------------------------


def key_pair(folder):
    private, public = folder / "key.pem", folder / "key.pub"
    tool("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private, cwd=folder)
    tool("openssl", "ec", "-in", private, "-pubout", "-out", public, cwd=folder)
    return private, public


@pytest.fixture
def keys(tmp_path):
    return key_pair(tmp_path)


def test_a_signature_is_one_that_model_signing_accepts(model, keys):
    private, public = keys
    done = run("manifest", model, "--sign", private)
    assert done.exit_code == 0, done.output
    arguments = ["verify", "key", "--signature", model / "model.sig", "--public_key", public, model]
    theirs = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    assert subprocess.run(theirs, capture_output=True, check=False).returncode == 0
    done = run("verify", model, "--key", public)
    assert done.exit_code == 0, done.output
    flip_bit(model / MANIFEST, 40, 0)
    assert subprocess.run(theirs, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("name", ["config.json", MANIFEST, TENSORS, "SHA256SUMS", "model.sig"])
def test_nothing_that_was_signed_can_be_altered(model, keys, name):
    private, public = keys
    run("manifest", model, "--sign", private)
    flip_bit(model / name, 3, 0)
    report = signatures.check(model, public)
    assert (kinds(report), report.exit_code) == (["bad_signature"], 1)


def test_a_signature_by_somebody_else_is_a_finding(model, keys, tmp_path):
    run("manifest", model, "--sign", keys[0])
    (tmp_path / "other").mkdir()
    _, public = key_pair(tmp_path / "other")
    done = run("verify", model, "--key", public)
    assert done.exit_code == 1
    assert "no signature of these files" in done.stdout


def test_a_signature_that_is_not_there_and_a_key_that_is_none_cannot_be_used(listed, keys):
    assert run("verify", listed, "--key", keys[1]).exit_code == 2
    done = run("manifest", listed, "--sign", listed / "config.json")
    assert done.exit_code == 2
    assert "was not signed" in done.stderr


def test_without_model_signing_the_extra_is_named(listed, keys, monkeypatch):
    for name in ("model_signing", "model_signing.signing", "model_signing.hashing"):
        monkeypatch.setitem(sys.modules, name, None)
    done = run("manifest", listed, "--sign", keys[0])
    assert done.exit_code == 2
    assert "pip install 'hallo-numguard[sign]'" in done.stderr
    assert run("verify", listed).exit_code == 0
