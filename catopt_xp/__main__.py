"""`python -m catopt_xp`: the command line. Floor F6."""

from __future__ import annotations

import sys

try:
    from catopt_xp.cli import entry
    from catopt_xp.ending import command_line
except KeyboardInterrupt:  # Ctrl-C in the first moments
    print("catopt-xp: interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    entry(command_line([sys.executable, "-m", "catopt_xp"]))
