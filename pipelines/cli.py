"""The `reelway` command. A sub-command's module is imported only when that sub-command runs."""

import importlib
import logging
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from .. import __version__

# Name of a sub-command, and the line that --help shows. The `app` of its module, which has its name unless MODULES
# says another, is a typer app, and may import what it likes.
COMMANDS = {
    "ablation": "Train and grade what the paper's table compares: each way to a student.",
    "bench": "Measure a streaming student and its teacher: speed, latency, memory, and their floor.",
    "card": "Write a student's model card from its ablation: scores, curves, samples.",
    "checkpoint": "Inspect, import and export checkpoints of video transformers.",
    "demo": "Run the whole line on this machine, small, and write a page that shows it.",
    "distill": "Distil an initialised student from its teacher: CausVid, Self-Forcing, long rollouts.",
    "evaluate": "Grade models over a sweep of prompts, seeds and settings; write a report.",
    "ingest": "Make latent shards from real videos and their captions.",
    "initialize": "Train a causal student on a teacher's trajectories (ODE initialisation).",
    "load": "Play many viewers to a running server, and report what they saw.",
    "pretrain": "Train a tiny VAE, text encoder and teacher on the sprites world.",
    "rollout": "Stream videos from a student: from text, an image or a video, of any length.",
    "serve": "Serve students as live streams, with a page to play with.",
    "shards": "Inspect, verify and repair data sets of shards.",
    "sprites": "Look at the embedded video world; grade models and videos in it.",
    "trajectories": "Make a teacher's ODE trajectories for a set of prompts.",
}
MODULES = {"load": "serve.load", "serve": "serve.commands"}
USER_ERRORS = (ValueError, OSError)

app = typer.Typer(name="reelway", no_args_is_help=True, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def reelway(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil bidirectional video diffusion models into streaming causal ones, and run them."""


def _forwarding_to(name: str) -> Callable[[typer.Context], object]:
    def run(context: typer.Context) -> object:
        module = importlib.import_module(f".{MODULES.get(name, name)}", __package__)
        return module.app(args=context.args, prog_name=f"reelway {name}", standalone_mode=False)

    return run


for _name, _help in COMMANDS.items():
    app.command(
        _name,
        help=_help,
        add_help_option=False,  # --help belongs to the sub-command
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
        },
    )(_forwarding_to(_name))


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    # Whatever imports DeepSpeed on a machine without a GPU would say so on stderr, in every command.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        status = app(prog_name="reelway", standalone_mode=False)
    except TyperException as error:
        if not error.format_message():  # a group without a command: its help is the answer
            error.show()
            raise SystemExit(2) from None
        _refuse(f"{error.format_message()}{_hint(error)}")
    except USER_ERRORS as error:
        _refuse(str(error))
    except typer.Abort:
        raise SystemExit(130) from None
    raise SystemExit(status if isinstance(status, int) else 0)


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"reelway: {' '.join(message.split())}\n")
    raise SystemExit(2)


def _hint(error: TyperException) -> str:
    return f" See '{error.ctx.command_path} --help'." if isinstance(error, typer.BadParameter) and error.ctx else ""


if __name__ == "__main__":
    main()
