"""The commands: what each reads and writes, its flags, and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from inspect import Parameter
from typing import Annotated, Any

import typer

from dfkd_cli import catalog
from dfkd_cli.cli import arguments, listing
from dfkd_cli.errors import ConfigError, DfkdError, Interrupted, memory_can_end
from dfkd_cli.processes import first_process, join_machines, stop_on_signals
from dfkd_cli.resolve import TYPED, Layer, Settings, assignments, choose, recipe_layer, resolve
from dfkd_cli.settings import CHOICES, INPUTS, Run
from dfkd_cli.ui import NORMAL, QUIET, VERBOSE, Terminal

HELP = {
    "train-teacher": "Train a teacher on a dataset.\n\nReads a dataset, writes a model directory (teacher/).",
    "collect-metadata": "Record activation statistics of a teacher while its training images are at hand.\n\nReads a "
    "teacher and its dataset, writes a metadata directory (metadata/) for methods that use metadata.",
    "synthesize": "Make data impressions from a teacher, without data.\n\nReads a teacher, writes a shard directory "
    "(shards/). The flags of a method: dfkd synthesize --method NAME --help",
    "distill": "Train a smaller student from a teacher and a transfer set.\n\nReads a teacher and transfer sets, "
    "writes a model directory (student/). The flags of an objective: dfkd distill --objective NAME --help",
    "evaluate": "Measure models on test images, or images on a teacher.\n\nReads model or shard directories, folders "
    "of images, datasets by name, real:N, noise:N; writes results.json when --out is given.",
    "compare": "Put finished directories side by side, or run a grid of pipelines.\n\nReads model and shard "
    "directories, and of a comparison what its grid has made so far; writes comparison/ with results.json, table.md "
    "and report.html.",
}
EXAMPLES = {
    "train-teacher": ["dfkd train-teacher", "dfkd train-teacher --dataset mnist --model lenet5 --out teacher/"],
    "collect-metadata": ["dfkd collect-metadata", "dfkd collect-metadata --teacher teacher/ --data-dir data/"],
    "synthesize": ["dfkd synthesize --method zskd --beta 1.0 0.1", "dfkd synthesize --method noise --num-images 1000"],
    "distill": ["dfkd distill --transfer-set shards/", "dfkd distill --transfer-set real:200 --student lenet5-half"],
    "evaluate": ["dfkd evaluate", "dfkd evaluate student/ --min-top1 0.97", "dfkd evaluate shards/ noise:1000 real"],
    "compare": [
        "dfkd compare student/",
        "dfkd compare --recipe digits --out grid/",
        "dfkd compare grid/ --out so-far/",
    ],
}
NEXT = {
    "train-teacher": "dfkd synthesize --method zskd",
    "collect-metadata": "dfkd synthesize --method lopes --metadata metadata/",
    "synthesize": "dfkd distill --transfer-set shards/",
    "distill": "dfkd evaluate",
    "evaluate": "dfkd compare student/",
    "compare": "open comparison/report.html",
}
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 200}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the process's exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    terminal = _terminal(argv)
    debug = "--debug" in argv or bool(os.environ.get("DFKD_DEBUG"))
    try:
        status = build(argv, terminal)(_expanded(argv), standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except typer.Exit as leave:
        return leave.exit_code
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
        code = getattr(stop, "exit_code", 128 + signal.SIGINT)
        terminal.error("interrupted", "stopped; what was finished is kept", "the same command continues")
        return code
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as leave:
        if isinstance(leave.__context__, BrokenPipeError):  # what Typer makes of it
            return _reader_gone()
        raise
    except Exception as error:
        traceback.print_exc()
        terminal.error(
            "bug", f"{type(error).__name__}: {error}", "this is a bug in dfkd; please report it with `dfkd info`"
        )
        return 1


def _reader_gone() -> int:
    """The exit code when nobody reads stdout any more; a failing last flush must not hide it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _terminal(argv: list[str]) -> Terminal:
    verbosity = QUIET if {"-q", "--quiet"} & set(argv) else VERBOSE if {"-v", "--verbose"} & set(argv) else NORMAL
    return Terminal(verbosity, as_json="--json" in argv, silent=not first_process())


def _try(argv: list[str]) -> str:
    command = next((token for token in argv if not token.startswith("-")), "")
    words = [command] if command in (*INPUTS, "ls", "cp", "info") else []
    for method in arguments.values_of(argv, "--method")[-1:] if words else ():
        words += ["--method", method]
    return f"try: dfkd {' '.join([*words, '--help'])}"


def _command_of(argv: list[str]) -> str | None:
    first = next((token for token in argv if not token.startswith("-")), None)
    return first if first in INPUTS else None


Chosen = list[tuple[str, catalog.Entry]]  # methods, each with the flag that names it


def _classes(command: str, chosen: Chosen) -> list[tuple[str, type]]:
    """The configuration classes that give a command its flags, each with the title of its help panel."""
    methods = [(f"{flag.capitalize()} {entry.name}", entry.config) for flag, entry in chosen]
    return [("Inputs", INPUTS[command]), *methods, ("Run", Run)]


def _chosen(command: str, argv: list[str]) -> Chosen:
    """The methods that the arguments name."""
    layers = _named_layers(argv, command)
    undecided = any(
        default is None and not any(layer.get(flag) for _, layer in layers)
        for flag, _, default in CHOICES.get(command, ())
    )
    if undecided and {"-h", "--help"} & set(argv):  # help must work before a method is chosen
        return []
    return [(flag, entry) for flag, picked in choose(command, layers).items() for entry, _ in picked]


def _named_layers(argv: list[str], command: str) -> list[Layer]:
    """What the arguments say about methods, before they are parsed: a method's flags exist only once it is known."""
    layers: list[Layer] = []
    # `--objective a b` must be read whole, other lists are not of interest here.
    tokens = arguments.expand(argv, {arguments.flag(flag) for flag, *_ in CHOICES.get(command, ()) if flag != "method"})
    for name in arguments.values_of(tokens, "--recipe")[-1:]:
        layers.append(recipe_layer(name, command))
    layers.append(("--set ", assignments(arguments.values_of(tokens, "--set"))))
    typed = {flag: arguments.values_of(tokens, arguments.flag(flag)) for flag, *_ in CHOICES.get(command, ())}
    layers.append(("", {flag: named[-1] if flag == "method" else named for flag, named in typed.items() if named}))
    return layers


def _expanded(argv: list[str]) -> list[str]:
    command = _command_of(argv)
    if command is None:
        return argv
    lists = arguments.list_flags(cls for _, cls in _classes(command, _chosen(command, argv)))
    lists |= {arguments.flag(flag) for flag, *_ in CHOICES.get(command, ()) if flag != "method"}
    return arguments.expand(argv, lists)


def build(argv: list[str], terminal: Terminal) -> typer.Typer:
    """The Typer application; the command that ``argv`` names has the flags of the methods it chooses."""
    app = typer.Typer(
        name="dfkd",
        help="Compress an image classifier whose training data nobody may see any more.",
        epilog="Start: dfkd train-teacher, dfkd synthesize --method zskd, dfkd distill, dfkd compare student/",
        context_settings=CONTEXT,
        add_completion=True,
        no_args_is_help=False,
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

    active = _command_of(argv)
    for command in catalog.COMMANDS:
        function: Any = _named
        text = HELP[command]
        if command == active:  # the flags of the others would be read and thrown away
            chosen = _chosen(command, argv)
            function, text = _stage(command, _classes(command, chosen), terminal), _help(command, chosen)
        app.command(
            command,
            help=text,
            epilog=_epilog(command) if command == active else None,
            context_settings=CONTEXT,
        )(function)
    listing.register(app, terminal)
    return app


def _named() -> None:
    """A command that is only listed."""


def _help(command: str, chosen: Chosen) -> str:
    """What a command does, and what the methods are that it is to use."""
    lines = [HELP[command]]
    for _, entry in chosen:
        needs = f" Needs: {', '.join(entry.needs)}." if entry.needs else ""
        lines.append(f"{entry.name}: {entry.summary}{f' ({entry.paper})' if entry.paper else ''}.{needs}")
    return "\n\n".join(lines)


def _epilog(command: str) -> str:
    lines = ["Examples:", *EXAMPLES[command], f"Next: {NEXT[command]}"]
    for flag, package, default in CHOICES.get(command, ()):
        known = ", ".join(catalog.entries(package))
        lines.append(f"--{flag}: {known}" + (f" (default {default})" if default else ""))
    return "\n\n".join(lines)


def _stage(command: str, classes: list[tuple[str, type]], terminal: Terminal) -> Any:
    """The function behind a command, with the signature that Typer reads."""
    parameters: dict[str, Parameter] = {}
    for title, cls in classes:
        for name, parameter in arguments.parameters(cls, title).items():
            parameters.setdefault(name, parameter)  # one flag reaches every section that has the key

    def extra(name: str, annotation: Any, *decls: str, help: str, panel: str = "Run", **more: Any) -> None:
        info = typer.Option(*decls, help=help, rich_help_panel=panel, show_default=False, **more)
        parameters[name] = Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=False if annotation is bool else None,
            annotation=Annotated[annotation, info],
        )

    for flag, *_ in CHOICES.get(command, ()):
        kind = str | None if flag == "method" else list[str] | None
        metavar = "NAME" if flag == "method" else "NAME[=WEIGHT] ..."
        extra(flag, kind, f"--{flag}", help=f"{flag}: see below", panel="Inputs", metavar=metavar)
    extra("recipe", str | None, "--recipe", help="recipe: NAME (dfkd ls recipes) or FILE.yaml", metavar="NAME|FILE")
    extra("set", list[str] | None, "--set", help="override any key", metavar="KEY=VALUE ...")
    extra("dry_run", bool, "--dry-run", help="check everything, run one small step, write nothing")
    extra("json", bool, "--json", help="print exactly one JSON document on stdout")
    extra("quiet", bool, "-q", "--quiet", help="errors only")
    extra("verbose", bool, "-v", "--verbose", help="more messages")
    extra("debug", bool, "--debug", help="show tracebacks")
    if command in ("evaluate", "compare"):
        what = {
            "evaluate": "model or shard directories, other images",
            "compare": "model, shard or comparison directories",
        }[command]
        info = typer.Argument(metavar="PATH ...", help=what, show_default=False)
        parameters["paths"] = Parameter(
            "paths", Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, info]
        )

    def stage(**values: Any) -> None:
        paths = values.pop("paths", None) or []
        recipe, dry_run = values.pop("recipe"), values.pop("dry_run")
        for name in ("json", "quiet", "verbose", "debug"):
            values.pop(name)
        stack = [recipe_layer(recipe, command)] if recipe else []
        stack.append(("--set ", assignments(values.pop("set") or [])))
        stack.append((TYPED, {name: value for name, value in values.items() if value not in (None, [])}))
        run_stage(resolve(command, stack), terminal, paths=paths, dry_run=dry_run)

    stage.__name__ = command.replace("-", "_")
    return arguments.with_signature(stage, parameters.values())


def run_stage(settings: Settings, terminal: Terminal, paths: list[str], dry_run: bool) -> None:
    """Carry out a command; torch is imported here, not before."""
    stop_on_signals()
    start = time.monotonic()
    if settings.run.num_nodes > 1 and settings.command not in CHOICES:
        raise ConfigError(f"{settings.command} runs on one machine", "leave out --num-nodes")
    if settings.run.num_nodes > 1 and settings.run.overwrite:
        raise ConfigError("--overwrite: several machines begin at different times", "remove the directory first")
    join_machines(1 if dry_run else settings.run.num_nodes)
    stage = importlib.import_module(f"dfkd_cli.stages.{settings.command.replace('-', '_')}")
    from dfkd_cli.stages.inputs import pick_device

    device = pick_device(settings.run.device, settings.run.devices if settings.command in CHOICES else 1)
    if device.type == "cpu" and settings.run.precision == "16":
        raise ConfigError("--precision 16: not on a CPU", "give --precision bf16, or 32, which is faster on most")
    more = {"paths": paths} if paths or settings.command in ("evaluate", "compare") else {}
    with memory_can_end():
        answer = stage.run(settings, terminal, dry_run=dry_run, **more)
    answer = {"ok": True, "command": settings.command, **answer, "seconds": round(time.monotonic() - start, 3)}
    terminal.document(answer)
