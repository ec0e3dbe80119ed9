"""The command line as a whole: which commands there are, what their help costs and says, how errors end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hallo_numguard import cli

from weights import model_folder

FILES = sorted(path.stem for path in Path(cli.__file__).parent.glob("[!_]*.py"))
HEAVY = {"torch", "numpy", "rich", "jinja2", "plotly", "safetensors", "deepspeed", "triton"}


def run(*arguments):
    return CliRunner().invoke(cli.main, list(map(str, arguments)), prog_name="hallo-numguard")


def test_every_file_is_a_command():
    assert {"diff", "env", "manifest", "preflight", "report", "scan", "verify"} <= set(FILES)
    assert cli.main.list_commands(None) == FILES
    assert [cli.main.get_command(None, name).name for name in FILES] == FILES
    assert cli.main.get_command(None, "_shared") is None


@pytest.mark.parametrize("arguments", [[], *([name] for name in FILES)], ids=str)
def test_help_imports_nothing_heavy_and_says_how_to_use_it(arguments):
    code = (
        "import sys\n"
        "from hallo_numguard.cli import main\n"
        "try: main([*sys.argv[2:], '-h'], prog_name='hallo-numguard')\n"
        "finally: print(set(sys.argv[1].split(',')) & set(sys.modules), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code, ",".join(HEAVY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"
    for part in (" ".join(["Usage: hallo-numguard", *arguments]), "\n  Examples:\n", "\n  Exit codes:\n", "130"):
        assert part in done.stdout


def test_the_group_says_how_to_complete_and_the_shell_can():
    line = next(line.strip() for line in run("-h").stdout.splitlines() if "bash_source" in line)
    script = subprocess.run(
        [sys.executable, "-m", "hallo_numguard"],
        env={**os.environ, "_HALLO_NUMGUARD_COMPLETE": "bash_source"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert line == 'eval "$(_HALLO_NUMGUARD_COMPLETE=bash_source hallo-numguard)"'
    assert "complete -o nosort -F _hallo_numguard_completion hallo-numguard" in script.stdout


def test_env_names_the_locks_that_a_run_would_wait_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    facts = json.loads(run("env", "--format", "json").stdout)
    assert facts["locks of torch's extensions"] == "none"
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    facts = json.loads(run("env", "--format", "json").stdout)
    assert facts["locks of torch's extensions"].startswith(str(lock))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "missing.json"], "missing.json cannot be read: No such file or directory"),
        (["manifest", "missing"], "missing"),
        (["scan", "missing", "--dtype", "int8"], "int8"),
        (["preflight"], "there is nothing to check: give --model, --checkpoint or --config"),
        (["scan"], "Missing argument 'PATHS...'."),
        (["scan", "model", "--threads", "0"], "Invalid value for '--threads'"),
        (["unknown"], "No such command 'unknown'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_messages_on_stderr_or_a_document_on_stdout(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr.partition("Error: ")[2]
    as_json = run(*arguments, "--format", "json")
    assert (as_json.exit_code, as_json.stderr) == (2, "")
    document = json.loads(as_json.stdout)
    assert message in document.pop("error")
    assert document == {"schema_version": 1, "ok": False, "exit_code": 2}


@pytest.mark.parametrize("arguments", [["manifest"], ["verify"], ["report"], ["diff", model_folder()]], ids=str)
def test_a_path_that_is_not_there_is_named_as_harmless_text(tmp_path, arguments):
    done = run(*arguments, tmp_path / "missing\x1b[2J")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "missing" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("style", ["human", "json"])
def test_an_interrupted_command_exits_as_shells_expect(monkeypatch, style):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hallo_numguard.files.diff.diff", interrupted)
    done = run("diff", "a", "b", "--format", style)
    assert done.exit_code == 130
    assert "interrupted" in (done.stdout if style == "json" else done.stderr)
