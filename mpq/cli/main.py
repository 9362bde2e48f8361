"""The command line: `mpq COMMAND`. Heavy modules are imported by the command that needs them."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from mpq import __version__
from mpq.cli import (
    allocate,
    bench,
    completion,
    evaluate,
    export,
    finetune,
    formats,
    generate,
    judge,
    plot,
    profile,
    proxy,
    quantize,
)
from mpq.cli import recipe as recipes
from mpq.cli.options import adding_to
from mpq.core import libraries
from mpq.core.errors import MpqError

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130
COMMANDS = (
    quantize,
    finetune,
    profile,
    allocate,
    plot,
    export,
    evaluate,
    generate,
    bench,
    judge,
    proxy,
    formats,
    completion,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code: 0, 2 invalid input, 130 interrupted."""
    top, commands = grammar()
    try:
        options = top.parse_args(recipes.expand(sys.argv[1:] if arguments is None else arguments, commands))
        level = logging.ERROR if options.quiet else logging.WARNING - 10 * options.verbose
        logging.basicConfig(level=level, format="mpq: %(message)s")
        if os.environ.get("WORLD_SIZE", "1") != "1" and options.run is not profile.run:
            raise MpqError("only 'mpq profile' supports torchrun; pass its table with quantize --table")
        libraries.warn_about_missing()
        options.run(options)
    except MpqError as error:
        print(f"mpq: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        print("mpq: interrupted; run the same command to resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
    except OSError as error:
        print(f"mpq: {error.filename or 'the system refuses'}: {error.strerror or error}", file=sys.stderr)
        return EXIT_MISTAKE
    return 0


def parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    return grammar()[0]


def grammar() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of all commands, and each command's own by name."""
    top = argparse.ArgumentParser(
        prog="mpq", description="Find each layer's number format, see the whole frontier, write packed weights."
    )
    top.add_argument("--version", action="version", version=f"mpq {__version__}")
    top.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice: everything")
    top.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors (and --json)")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    command = adding_to(commands)
    for module in COMMANDS:
        module.add(command)
    return top, commands.choices


if __name__ == "__main__":
    sys.exit(main())
