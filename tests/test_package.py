"""What a user gets from pip: a lazy import, an extension without torch in it, wheels that work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hallo_numguard.ops.backends import cpu as native
from hallo_numguard.ops.native_extension import extension

ROOT = Path(__file__).parent.parent


def python(code, **environment):
    """Runs code in a fresh interpreter and returns what it printed."""
    settings = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
"""


def test_the_import_and_reports_work_without_torch():
    code = BLOCK.format(blocked={"torch", "numpy", "deepspeed", "triton"}) + (
        "import hallo_numguard as ng\n"
        "report = ng.OverflowReport(1, 8.0, ng.Verdict.UNDETERMINED, False, None, None, (), ('seen',), (), 'look')\n"
        "assert ng.OverflowReport.from_json(report.to_json()) == report\n"
        "print(report)\n"
    )
    assert "Step 1 was skipped" in python(code)


def test_statistics_work_without_deepspeed_and_triton():
    code = BLOCK.format(blocked={"deepspeed", "triton"}) + (
        "import torch, hallo_numguard as ng\n"
        "print(ng.tensor_stats(torch.tensor([1.0, float('nan')])).to_host()[0].nan)\n"
    )
    assert python(code).strip() == "1"


def test_every_public_name_resolves():
    import hallo_numguard

    for name in hallo_numguard.__all__:
        assert getattr(hallo_numguard, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hallo_numguard.no_such_name


def test_without_the_extension_the_reference_runs_and_says_so_once():
    code = (
        "import sys; sys.modules['hallo_numguard._native'] = None\n"
        "import torch, hallo_numguard as ng\n"
        "for _ in range(3): record = ng.tensor_stats(torch.tensor([3.0, 4.0])).to_host()[0]\n"
        "print(record.norm)\n"
    )
    settings = {k: v for k, v in os.environ.items() if not k.startswith("HALLO_NUMGUARD")}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "5.0"
    assert done.stderr.count("the native backend is not used") == 1


def test_env_names_the_backend_and_why_the_others_were_not_chosen():
    done = subprocess.run(
        [sys.executable, "-m", "hallo_numguard", "env", "--format", "json"], capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert facts["backends"]["cpu"]["chosen"] == "native"
    assert facts["instruction set"] in native.isas()
    assert set(facts["backends"]["cpu"]["not_used"]) == {"triton", "torch", "reference"}
    assert ("cuda" in facts["backends"]) == (facts["gpu"] != "none")


def test_the_extension_links_no_torch_symbol():
    module = extension()
    assert module is not None
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", module.__file__], capture_output=True, text=True, check=True
    )
    wanted = [line for line in symbols.stdout.splitlines() if any(x in line for x in ("c10", "torch", "at6Tensor"))]
    assert wanted == []
    needed = subprocess.run(["readelf", "-d", module.__file__], capture_output=True, text=True, check=True).stdout
    assert "libtorch" not in needed
    assert "libc10" not in needed


def test_the_version_stands_in_one_place():
    import hallo_numguard

    assert metadata.version("hallo-numguard") == hallo_numguard.__version__


def asked(extra):
    """What an extra of the package asks for, with the package's own requirements."""
    wanted = [Requirement(line) for line in metadata.requires("hallo-numguard")]
    chosen = [one for one in wanted if one.marker is None or "extra" not in str(one.marker)]
    chosen += [one for one in wanted if f'extra == "{extra}"' in str(one.marker)]
    for one in chosen:
        if one.name == "hallo-numguard":
            for other in one.extras:
                yield from asked(other)
        elif one.name not in ("torch", "triton", "jinja2"):  # torch brings the last
            yield one


def locked(extra, environment):
    """The versions that a lock pins on one Python."""
    lines = (ROOT / "requirements" / f"{extra}.txt").read_text("utf-8").splitlines()
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate(environment)]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("extra", ["demo", "test", "bench", "lint", "release"])
def test_a_lock_holds_what_its_extra_asks_for(extra, python_version):
    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0", "extra": extra}
    pins = locked(extra, environment)
    for wanted in asked(extra):
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), f"{wanted}: run make lock"
    brought_by_torch = [name for name in pins if name in ("torch", "triton", "sympy") or name.startswith("nvidia-")]
    assert brought_by_torch == []


def test_hooks_run_the_versions_of_the_lock():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    revisions = dict(re.findall(r"repo: https://github.com/\S+/(\S+)\n    rev: v(\S+)", hooks))
    pins = locked("lint", None)
    assert revisions == {
        "ruff-pre-commit": pins["ruff"],
        "mirrors-clang-format": pins["clang-format"],
        "typos": pins["typos"],
    }


def test_ci_tries_the_releases_of_deepspeed_that_the_makefile_lists():
    listed = re.search(r"^OLDER_DEEPSPEED \?= (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1].split()
    tried = re.search(r"release: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text("utf-8"))[1]
    assert re.findall(r'"([\d.]+)"', tried) == listed


def test_fragments_of_the_changelog_have_a_type():
    known = set(
        re.findall(r'\[\[tool.towncrier.type\]\]\ndirectory = "(\w+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    )
    names = {path.name for path in (ROOT / "changelog.d").iterdir()} - {"README.md", "template.md.jinja"}
    assert names
    assert {name.split(".")[1] for name in names} <= known
    assert all(name.endswith(".md") for name in names)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tree, so that building leaves nothing behind."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def test_sdist_and_wheel_build_and_the_wheel_works_elsewhere(source, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')  # twice as quick, and nobody asks for speed here
    compiler.chmod(0o755)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(
        build,
        check=True,
        capture_output=True,
        env={**os.environ, "CXX": str(compiler), "HALLO_NUMGUARD_BUILD_NATIVE": "1", "HALLO_NUMGUARD_CUDA": "0"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert list(tmp_path.glob("*.tar.gz"))
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True
    )
    templates = Path("hallo_numguard", "report", "html", "templates")
    shipped, wanted = ({path.name for path in (root / templates).iterdir()} for root in (target, ROOT))
    assert shipped == wanted
    code = (
        "import hallo_numguard, torch\n"
        "from hallo_numguard.ops.native_extension import extension\n"
        "print(hallo_numguard.__file__, extension().__file__)\n"
        "print(hallo_numguard.tensor_stats(torch.ones(4)).to_host()[0].norm)\n"
    )
    lines = python(code, PYTHONPATH=str(target)).splitlines()
    assert lines[0].count(str(target)) == 2
    assert lines[1] == "2.0"


def build_only(source, folder, **settings):
    """Runs setup.py's build_ext; settings with an empty value are those that are not set."""
    setup = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib")]
    environment = {**os.environ, **settings}
    return subprocess.run(setup, cwd=source, capture_output=True, text=True, check=False, env=environment)


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@needs_nvcc
def test_the_cuda_extension_needs_no_gpu_to_build_nor_cuda_to_load(source, tmp_path):
    done = build_only(
        source, tmp_path, HALLO_NUMGUARD_CUDA="1", HALLO_NUMGUARD_BUILD_NATIVE="0", TORCH_CUDA_ARCH_LIST="7.5;9.0"
    )
    assert done.returncode == 0, done.stderr
    (library,) = tmp_path.rglob("_native_cuda*.so")
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert not any(name in needed for name in ("libcuda", "libtorch", "libc10"))
    loaded = subprocess.run(
        [sys.executable, "-c", "import _native_cuda; print(_native_cuda.unavailable(0))"],
        cwd=library.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.startswith("CUDA: ") or loaded.stdout == "\n"
    code = library.read_bytes()
    assert b"sm_90" in code
    assert b"sm_80" not in code, "TORCH_CUDA_ARCH_LIST was not followed"


@needs_nvcc
def test_gpus_that_are_too_old_are_refused_by_name(source, tmp_path):
    refused = build_only(
        source, tmp_path, HALLO_NUMGUARD_CUDA="1", HALLO_NUMGUARD_BUILD_NATIVE="0", TORCH_CUDA_ARCH_LIST="7.0"
    )
    assert refused.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST='7.0'" in refused.stderr
    assert "older than 8.0" in refused.stderr


def test_without_nvcc_the_cuda_extension_is_left_out_unless_that_is_refused(source, tmp_path):
    bare = {"PATH": str(tmp_path), "CXX": "", "CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}
    bare["HALLO_NUMGUARD_BUILD_NATIVE"] = "0"
    assert build_only(source, tmp_path, **bare).returncode == 0
    assert not list(tmp_path.rglob("_native*"))
    refused = build_only(source, tmp_path, **bare, HALLO_NUMGUARD_CUDA="1")
    assert refused.returncode != 0
    assert "HALLO_NUMGUARD_CUDA=1 asks for it" in refused.stderr


def test_without_a_compiler_it_installs_without_the_extension_unless_that_is_refused(source, tmp_path):
    bare = {"PATH": str(tmp_path), "CXX": ""}  # hides every compiler; the interpreter is called by its full name
    auto = build_only(source, tmp_path, **bare)
    assert auto.returncode == 0, auto.stderr
    assert not list(tmp_path.rglob("_native*"))
    refused = build_only(source, tmp_path, **bare, HALLO_NUMGUARD_BUILD_NATIVE="1")
    assert refused.returncode != 0
    assert "no C++ compiler found" in refused.stderr
