"""The entry point: finds the command, and turns every user's mistake into one line.

Exit codes: 0 done; 1 some inputs failed, or the output could not be written to its end; 2 wrong
usage, or refused before anything was done; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, TextIO

from normwear_fast import __version__
from normwear_fast.errors import NormWearError, UsageError, one_line

COMMANDS = {
    "encode": ("normwear_fast.cli.encode", "recordings to embeddings"),
    "inspect": ("normwear_fast.cli.inspect", "what is in the recordings"),
    "plan": ("normwear_fast.cli.plan", "windows, bytes and hours before a long run"),
    "report": ("normwear_fast.cli.report", "an HTML page of an encode output"),
    "bench": ("normwear_fast.cli.bench", "the throughput of this machine"),
    "prepare": ("normwear_fast.cli.prepare", "recordings to shards for pretraining"),
    "convert": ("normwear_fast.cli.convert", "any checkpoint to safetensors"),
    "pretrain": ("normwear_fast.cli.pretrain", "train a model on prepared series"),
    "finetune": ("normwear_fast.cli.finetune", "train a head or the encoder on labelled windows"),
    "predict": ("normwear_fast.cli.predict", "recordings to predictions of a fine-tuned model"),
    "probe": ("normwear_fast.cli.probe", "linear probing, and preparing the public sets"),
    "zeroshot": ("normwear_fast.cli.zeroshot", "ask recordings a question in words"),
    "zeroshot-train": ("normwear_fast.cli.zeroshot_train", "train the zero-shot fusion module"),
}
"""Command to its module and what `--help` says of it; a module has HELP, EXAMPLE, add_arguments, run."""


class _Parser(argparse.ArgumentParser):
    """Argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print_error(UsageError(f"{message} ({self.prog} --help shows how)"))
        raise SystemExit(2)


def print_error(error: NormWearError | str) -> None:
    """One line on stderr."""
    print(f"normwear-fast: error: {error}", file=sys.stderr)


def seed(text: str) -> int:
    """The type of arguments that seed random numbers."""
    if not (text.strip().isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text} is no seed; a whole number in 0..2^63-1 is right")
    return int(text)


def goes_on(args: argparse.Namespace) -> str:
    """How a training that was stopped goes on; --overwrite would begin it anew once more."""
    return f"the same command {'without --overwrite ' if args.overwrite else ''}goes on"


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; of the commands only ``command`` is imported and knows its arguments."""
    parser = _Parser(
        prog="normwear-fast",
        description="NormWear embeddings of wearable recordings.",
        epilog="normwear-fast COMMAND --help shows a command's arguments and an example.",
    )
    parser.add_argument("--version", action="version", version=f"normwear-fast {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for name, (module_name, summary) in COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=summary, add_help=False)
            continue
        module = import_module(module_name)
        chosen = commands.add_parser(
            name,
            help=summary,
            description=module.HELP,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(chosen)
        chosen.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code."""
    _open_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    show = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        arguments = build_parser(chosen).parse_args(argv)
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except SystemExit as end:
        return int(end.code) if isinstance(end.code, int) else 0
    except NormWearError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print_error("stopped")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python would complain again at its exit.
        _discard_stdout()
        return 1
    except OSError as error:
        try:  # what has a file's name was not printed; else printing once more tells
            if error.filename is None:
                print(flush=True)
        except OSError:
            _discard_stdout()
            print_error(f"standard output: cannot be written ({one_line(error)})")
            return 1
        raise
    finally:
        warnings.showwarning = show


def _discard_stdout() -> None:
    """Sends what waits to be printed nowhere; Python would try again, and complain, at its exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _open_streams() -> None:
    """Opens what the shell has closed (`2>&-`): the next file opened, a user's output, would take the
    number of stderr and get what libraries print there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (kept to the end)
            setattr(sys, name, nowhere)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"normwear-fast: warning: {one_line(str(message), 1000)}", file=file or sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
