"""The commands: what each reads and writes, its flags, and the one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
import traceback
from contextlib import AbstractContextManager
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from dfkd_cli import catalog
from dfkd_cli.artifacts.copies import on_this_machine
from dfkd_cli.cli import arguments, listing
from dfkd_cli.data.access import access
from dfkd_cli.errors import ConfigError, DfkdError, Interrupted, machine_can_fail
from dfkd_cli.options import Run
from dfkd_cli.processes import (
    STOPPED,
    computing_with,
    dedicated,
    first_process,
    join_machines,
    lasting_imports,
    share_of_threads,
    stop_on_signals,
)
from dfkd_cli.settings import Layer, Settings, assigned_layer, choose, recipe_layer, resolve, typed_layer
from dfkd_cli.ui import NORMAL, QUIET, VERBOSE, Notes, Terminal
from dfkd_cli.urls import take_credentials

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 200}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the process's exit code."""
    argv = [take_credentials(word) for word in (sys.argv[1:] if argv is None else argv)]
    sys.argv = [take_credentials(word) for word in sys.argv]  # what records say, and other processes are started with
    terminal = _terminal(argv)
    debug = "--debug" in argv or bool(os.environ.get("DFKD_DEBUG"))
    try:
        with machine_can_fail():
            app, tokens = build(argv, terminal)
            status = app(tokens, standalone_mode=False)
            sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except typer.Abort:
        return 128 + signal.SIGINT
    except typer.TyperException as error:  # the parser's own usage errors
        terminal.error("usage", " ".join(error.format_message().split()), _try(argv) if error.exit_code == 2 else "")
        return error.exit_code
    except DfkdError as error:
        if debug:
            traceback.print_exc()
        terminal.error(error.code, error.message, error.hint, error.answer)
        return error.exit_code
    except (Interrupted, KeyboardInterrupt) as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        if signum != signal.SIGPIPE:
            terminal.error(*STOPPED)
        return 128 + signum
    except Exception as error:
        traceback.print_exc()
        terminal.error(
            "bug", f"{type(error).__name__}: {error}", "this is a bug in dfkd; please report it with `dfkd info`"
        )
        return 1


def _terminal(argv: list[str]) -> Terminal:
    flags = set(argv) | {f"-{letter}" for word in argv if re.fullmatch("-[qv]+", word) for letter in word[1:]}
    verbosity = QUIET if {"-q", "--quiet"} & flags else VERBOSE if {"-v", "--verbose"} & flags else NORMAL
    return Terminal(verbosity, as_json="--json" in argv, silent=not first_process())


def _try(argv: list[str]) -> str:
    command = next((token for token in argv if not token.startswith("-")), "")
    words = [command] if command in (*catalog.commands(), "ls", "cp", "info") else []
    for method in arguments.values_of(argv, "--method")[-1:] if words else ():
        words += ["--method", method]
    return f"try: dfkd {' '.join([*words, '--help'])}"


Chosen = list[tuple[str, catalog.Entry]]  # methods, each with the flag that names it


def _chosen(command: catalog.Command, argv: list[str]) -> Chosen:
    """The methods that the arguments name."""
    layers = _named_layers(command, argv)
    undecided = any(
        choice.default is None and not any(layer.get(choice.flag) for _, layer, _ in layers)
        for choice in command.choices
    )
    if undecided and {"-h", "--help"} & set(argv):  # help must work before a method is chosen
        return []
    return [(flag, entry) for flag, picked in choose(command.name, layers).items() for entry, _ in picked]


def _named_layers(command: catalog.Command, argv: list[str]) -> list[Layer]:
    """What the arguments say about methods, before they are parsed: a method's flags exist only once it is known."""
    layers: list[Layer] = []
    tokens = arguments.expand(argv, _several(command))  # `--objective a b`; other lists are not of interest here
    for name in arguments.values_of(tokens, "--recipe")[-1:]:
        layers.append(recipe_layer(name, command.name))
    layers.append(assigned_layer(arguments.values_of(tokens, "--set")))
    typed: dict[str, Any] = {}
    for choice in command.choices:
        if named := arguments.values_of(tokens, arguments.flag(choice.flag)):
            typed[choice.flag] = named if choice.several else named[-1]
    return [*layers, Layer("", typed)]


def _several(command: catalog.Command) -> set[str]:
    """The flags that name any number of methods."""
    return {arguments.flag(choice.flag) for choice in command.choices if choice.several}


def build(argv: list[str], terminal: Terminal) -> tuple[typer.Typer, list[str]]:
    """The Typer application, and the arguments as it takes them.

    The command that ``argv`` names has the flags of the methods it chooses, those of the others are not read.
    """
    app = typer.Typer(
        name="dfkd",
        help="Compress an image classifier whose training data nobody may see any more.",
        epilog="Start: dfkd train-teacher, dfkd synthesize --method zskd, dfkd distill, dfkd compare student/",
        context_settings=CONTEXT,
        pretty_exceptions_enable=False,
        # Some environments force colour, even into a pipe: there, help is plain.
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
    )

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    ) -> None:
        if version:
            from dfkd_cli import __version__

            typer.echo(__version__)
            raise typer.Exit
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())
            raise typer.Exit

    active = next((token for token in argv if not token.startswith("-")), None)
    for name, command in catalog.commands().items():
        function: Any = _named
        text, epilog = command.help, None
        if name == active:
            chosen = _chosen(command, argv)
            methods = [(f"{flag.capitalize()} {entry.name}", entry.config) for flag, entry in chosen]
            classes = [("Inputs", command.inputs), *methods, ("Run", Run)]
            argv = arguments.expand(argv, arguments.list_flags(cls for _, cls in classes) | _several(command))
            function, text, epilog = _stage(command, classes, terminal), _help(command, chosen), _epilog(command)
        app.command(name, help=text, epilog=epilog, context_settings=CONTEXT)(function)
    listing.register(app, terminal)
    return app, argv


def _named() -> None:
    """A command that is only listed."""


def _help(command: catalog.Command, chosen: Chosen) -> str:
    """What a command does, and what the methods are that it is to use."""
    lines = [command.help]
    for _, entry in chosen:
        needs = f" Needs: {', '.join(entry.needs)}." if entry.needs else ""
        lines.append(f"{entry.name}: {entry.summary}{f' ({entry.paper})' if entry.paper else ''}.{needs}")
    return "\n\n".join(lines)


def _epilog(command: catalog.Command) -> str:
    lines = ["Examples:", *command.examples, f"Next: {command.next}"]
    for choice in command.choices:
        names = ", ".join(catalog.entries(choice.package))
        lines.append(f"--{choice.flag}: {names}" + (f" (default {choice.default})" if choice.default else ""))
    return "\n\n".join(lines)


def _stage(command: catalog.Command, classes: list[tuple[str, type]], terminal: Terminal) -> Any:
    """The function behind a command, with the signature that Typer reads."""
    parameters: dict[str, Parameter] = {}
    for title, cls in classes:
        for name, parameter in arguments.parameters(cls, title).items():
            if cls is not Run or name not in command.ignores:
                parameters.setdefault(name, parameter)  # one flag reaches every section that has the key

    def extra(name: str, annotation: Any, *decls: str, help: str, panel: str = "Run", **more: Any) -> None:
        info = typer.Option(*decls, help=help, rich_help_panel=panel, show_default=False, **more)
        default = False if annotation is bool else None
        kind = Parameter.KEYWORD_ONLY
        parameters[name] = Parameter(name, kind, default=default, annotation=Annotated[annotation, info])

    for choice in command.choices:
        kind = list[str] | None if choice.several else str | None
        metavar = "NAME[=WEIGHT] ..." if choice.several else "NAME"
        extra(choice.flag, kind, f"--{choice.flag}", help=f"{choice.flag}: see below", panel="Inputs", metavar=metavar)
    extra("recipe", str | None, "--recipe", help="recipe: NAME (dfkd ls recipes) or FILE.yaml", metavar="NAME|FILE")
    extra("set", list[str] | None, "--set", help="override any key", metavar="KEY=VALUE ...")
    extra("dry_run", bool, "--dry-run", help="check everything, run one small step, write nothing")
    extra("json", bool, "--json", help="print exactly one JSON document on stdout")
    extra("quiet", bool, "-q", "--quiet", help="errors only")
    extra("verbose", bool, "-v", "--verbose", help="more messages")
    extra("debug", bool, "--debug", help="show tracebacks")

    def stage(**values: Any) -> None:
        recipe, dry_run = values.pop("recipe"), values.pop("dry_run")
        for name in ("json", "quiet", "verbose", "debug"):
            values.pop(name)
        stack = [recipe_layer(recipe, command.name)] if recipe else []
        stack.append(assigned_layer(values.pop("set") or []))
        stack.append(typed_layer({name: value for name, value in values.items() if value not in (None, [])}))
        with Notes(terminal).heard():
            settings = resolve(command.name, stack)
        run_stage(settings, terminal, dry_run)

    stage.__signature__ = Signature(list(parameters.values()))  # type: ignore[attr-defined]  # Typer reads it
    stage.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return stage


def _computing(command: catalog.Command, how: Run) -> AbstractContextManager[None]:
    """The threads that a command computes with. Torch is imported here.

    Raises:
        ConfigError: There is no such device, or it does not compute so.
    """
    from dfkd_cli.stages.inputs import check_precision, pick_device

    processes = how.devices if command.shared else 1
    check_precision(how, pick_device(how.device, processes))
    return computing_with(how.threads or share_of_threads(processes))


def run_stage(settings: Settings, terminal: Terminal, dry_run: bool) -> None:
    """Carry out a command."""
    start = time.monotonic()
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the working directory was removed", "change into one that exists") from None
    command, how = catalog.command(settings.command), settings.run
    if how.num_nodes > 1 and how.overwrite:
        raise ConfigError("--overwrite: several machines begin at different times", "remove the directory first")
    join_machines(1 if dry_run else how.num_nodes)
    if command.copies:
        settings = on_this_machine(settings, terminal, known=not first_process())
    reach = access(settings, dry_run) if dedicated() else None
    with Notes(terminal).heard(), contextlib.nullcontext() if reach is None else reach.confined():
        with lasting_imports():
            run = command.load()
        stop_on_signals()
        computing = contextlib.nullcontext() if "device" in command.ignores else _computing(command, how)
        with computing, contextlib.redirect_stdout(sys.stderr):  # what users' networks print is no answer
            answer = run(settings, terminal, dry_run=dry_run)
    answer = {"ok": True, "command": command.name, **answer, "seconds": round(time.monotonic() - start, 3)}
    terminal.document(answer)
