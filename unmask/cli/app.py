"""The ``unmask`` command: its commands, and how errors leave it.

Exit codes: 0 done; 1 something nobody foresaw; 2 something the user can mend, said in one line; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from unmask.cli import speech
from unmask.cli.commands import (
    checking,
    comparing,
    compressing,
    demonstration,
    evaluating,
    explaining,
    exporting,
    generating,
    listing,
    predicting,
    reading,
    reproducing,
    training,
)
from unmask.errors import UserError, nearest

_HELP = """Hide something, and learn from what is missing.

First steps: [bold]unmask demo[/bold], [bold]unmask list[/bold], [bold]unmask train mae --data photos/[/bold]"""


class Stopped(Exception):
    """Ctrl-C on its way out: typer would turn a KeyboardInterrupt into a silent exit, and lose what it says."""

    def __init__(self, stop: KeyboardInterrupt):
        super().__init__(str(stop) or "stopped")
        self.exit_code = int(getattr(stop, "exit_code", 130))


class Commands(TyperGroup):
    """The group of all commands."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Stopped(stop) from stop


app = typer.Typer(
    name="unmask",
    cls=Commands,
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for module in (
    listing,
    training,
    evaluating,
    predicting,
    generating,
    compressing,
    explaining,
    comparing,
    reading,
    exporting,
    reproducing,
    demonstration,
    checking,
):
    module.register(app)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="The version, and leave.", is_eager=True)) -> None:
    if version:
        import unmask

        speech.result(unmask.__version__)
        raise typer.Exit


# Typer carries its own copy of click since 0.27; its exceptions are found through a class it exports in every version.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # type: ignore[assignment]
_ClickException: type[Exception] = _UsageError.__mro__[1]  # type: ignore[assignment]

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
}


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False, prog_name="unmask")
        return code if isinstance(code, int) else 0
    except UserError as error:
        speech.complain(str(error))
        return 2
    except _ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            return 0
        speech.complain(_usage(error))
        return 2
    except Stopped as stop:  # the engine's kind says what was saved and how to go on
        speech.complain(str(stop))
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        speech.complain("stopped")
        return 130
    except BrokenPipeError:  # `unmask list | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in _DISK:
            speech.crash(error)
            return 1
        speech.complain(
            f"cannot write {error.filename or 'there'}: {_DISK[error.errno]}: choose another --out or make room"
        )
        return 2
    except Exception as error:
        speech.crash(error)
        return 1


def main() -> None:
    """The entry point of the installed command."""
    code = run()
    if "torch.distributed" in sys.modules:
        from unmask.engine.distributed import leave

        leave(code)
    sys.exit(code)


def _usage(error: Any) -> str:
    """A usage error in one line: which word, in which command, the nearest right one."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "unmask"
    known = _option_names(context)
    kind = type(error).__name__
    if kind == "NoSuchOption":
        return f"no option {error.option_name} in {command}: {nearest(error.option_name, known)}"
    message = error.format_message().strip().rstrip(".")
    if message.startswith("No such command"):
        word = message.split("'")[1] if "'" in message else message
        names = list(getattr(context.command, "commands", {})) if context is not None else []
        return f'no command "{word}": {nearest(word, names)}'
    if kind == "MissingParameter":
        parameter = error.param
        name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar or parameter.name
        return f"{command} needs {name}: see {command} --help"
    return f"{command}: {message[0].lower()}{message[1:]}: see {command} --help"


def _option_names(context: Any) -> list[str]:
    if context is None:
        return []
    return [name for parameter in context.command.params for name in parameter.opts if name.startswith("-")]


if __name__ == "__main__":
    main()
