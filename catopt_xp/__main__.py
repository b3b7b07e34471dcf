"""`python -m catopt_xp`: the command line."""

from __future__ import annotations

import os
import sys


def _open_standard_streams() -> None:
    """Puts nothing in place of standard streams that are closed: the next file opened would get their number, and with
    it whatever a library in C prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free


def _why_not(error: Exception) -> str:
    """Why the program cannot start, in one line."""
    try:
        os.getcwd()
    except OSError:
        return "the current folder was removed: change to one that exists"
    text = " ".join(str(error).split())
    return f"cannot start ({type(error).__name__}{f': {text}' if text else ''}); --debug shows where"


_open_standard_streams()
try:
    from catopt_xp.commands.main import entry
    from catopt_xp.commands.messages import command_line
except KeyboardInterrupt:  # Ctrl-C in the first moments
    print("catopt-xp: interrupted", file=sys.stderr)
    sys.exit(130)
except Exception as error:  # too little memory, too many open files, an environment that a library refuses
    if "--debug" in sys.argv:
        raise
    print(f"catopt-xp: error: {_why_not(error)}", file=sys.stderr)
    sys.exit(1)

if __name__ == "__main__":
    entry(command_line([sys.executable, "-m", "catopt_xp"]))
