"""The command line: `mpq COMMAND`. Heavy modules are imported by the command that needs them."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from mpq.cli import allocate, bench, evaluate, export, formats, generate, judge, plot, profile, proxy, quantize
from mpq.cli.options import adding_to
from mpq.core.errors import MpqError

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130
COMMANDS = (quantize, profile, allocate, plot, export, evaluate, generate, bench, judge, proxy, formats)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, 2 for what was asked wrongly, 130 when interrupted."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING - 10 * options.verbose, format="mpq: %(message)s")
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1" and options.run is not profile.run:
            raise MpqError("of all commands torchrun starts 'mpq profile' alone: give its table to quantize --table")
        options.run(options)
    except MpqError as error:
        print(f"mpq: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        print("mpq: interrupted; the same command goes on from what is done", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
    return 0


def parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    top = argparse.ArgumentParser(
        prog="mpq", description="Find each layer's number format, see the whole frontier, write packed weights."
    )
    top.add_argument("-v", "--verbose", action="count", default=0, help="say more")
    command = adding_to(top.add_subparsers(metavar="COMMAND", required=True))
    for module in COMMANDS:
        module.add(command)
    return top


if __name__ == "__main__":
    sys.exit(main())
