"""The command line, `hallo-numguard`: each file of this folder is the command of its name.

A command returns its exit code, and raises errors, which are printed here.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from hallo_numguard import __version__
from hallo_numguard.cli._shared import epilog
from hallo_numguard.core.errors import NumGuardError
from hallo_numguard.core.safe_text import harmless

ERROR_SCHEMA_VERSION = 1

_CANNOT_CHECK = 2
_INTERRUPTED = 130  # as shells count: 128 and the number of the signal

_EXAMPLES = epilog(
    "preflight --model model/ --checkpoint run/ --world-size 8",
    "scan model.safetensors --dtype float16",
    "report dump/*.json --html report.html",
)
_COMPLETION = """\b
Shell completion, for ~/.bashrc (zsh and fish: zsh_source, fish_source):
  eval "$(_HALLO_NUMGUARD_COMPLETE=bash_source hallo-numguard)"
"""


class Commands(click.Group):
    """The commands, one file each in this folder, imported when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of all commands."""
        return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns the command of a name; None if there is none."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        """Runs a command, and exits with its code."""
        arguments = sys.argv[1:] if args is None else list(args)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a terminal may have no letters but ASCII
        is_json = "--format=json" in arguments or ("--format", "json") in itertools.pairwise(arguments)
        try:
            code = super().main(arguments, *positional, **{**options, "standalone_mode": False})
        except click.Abort:
            _fail("interrupted", _INTERRUPTED, is_json)
        except click.ClickException as error:
            if is_json:
                _fail(error.format_message(), error.exit_code, is_json)
            error.show()
            sys.exit(error.exit_code)
        except NumGuardError as error:
            _fail(str(error), _CANNOT_CHECK, is_json)
        except OSError as error:
            name = error.filename or "a file"
            _fail(f"{name} cannot be read or written: {error.strerror or error}", _CANNOT_CHECK, is_json)
        sys.exit(code)


def _fail(message: str, code: int, is_json: bool) -> NoReturn:
    message = harmless(message)
    if is_json:
        document = {"schema_version": ERROR_SCHEMA_VERSION, "ok": False, "exit_code": code, "error": message}
        click.echo(json.dumps(document))
    else:
        click.echo(f"Error: {message}", err=True)
    sys.exit(code)


@click.group(
    cls=Commands,
    epilog=f"{_EXAMPLES}\n\n{_COMPLETION}",
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(__version__)
def main() -> None:
    """Numerics guard for PyTorch and DeepSpeed training.

    Checks weights, checkpoints and the settings of a run before its first step, and shows the reports of guarded runs.
    """
