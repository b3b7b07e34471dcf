"""Times this library's engines and their peers on a CPU, as `catopt-xp bench` does without the peers.

python -m benchmarks.peers [--contenders panels,plain,torch] [the flags of catopt-xp bench]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from benchmarks.peers.contenders import CONTENDERS, QUICK
from catopt_xp.commands.bench import Entry
from catopt_xp.commands.flags import add_bench
from catopt_xp.commands.main import run_bench
from catopt_xp.commands.messages import BAD_USAGE, DONE, FAILED, INTERRUPTED, UsageError, one_line

PROGRAM = "python -m benchmarks.peers"


def names(text: str) -> tuple[str, ...]:
    """Names, none twice.

    >>> names("panels, plain,panels")
    ('panels', 'plain')
    """
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def parser() -> argparse.ArgumentParser:
    """The flags of `catopt-xp bench`, and the contenders."""
    description = "Time an epoch against batch size: ours, other libraries, and what this machine could do at best."
    made = argparse.ArgumentParser(prog=PROGRAM, description=description, allow_abbrev=False)
    group = add_bench(made)
    group.add_argument(
        "--contenders",
        type=names,
        metavar="NAME,...",
        help=f"of {', '.join(CONTENDERS)}; the others are compared with the first (default: all; --quick: all but"
        " chapter)",
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def chosen(arguments: argparse.Namespace) -> Mapping[str, Entry]:
    """The contenders that the flags name. Raises UsageError for an unknown name."""
    wanted = arguments.contenders or (QUICK if arguments.quick else tuple(CONTENDERS))
    for name in wanted:
        if name not in CONTENDERS:
            raise UsageError(f"unknown contender {name!r}; choose {', '.join(CONTENDERS)}")
    return {name: CONTENDERS[name] for name in wanted}


def main(words: Sequence[str] | None = None) -> int:
    """Times what the flags ask for, and returns the exit status, as `catopt-xp bench` has it."""
    arguments = parser().parse_args(words)
    try:
        run_bench(arguments, chosen(arguments))
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            raise
        print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr)
        return BAD_USAGE if isinstance(error, UsageError) else FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
