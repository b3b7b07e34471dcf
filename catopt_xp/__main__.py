"""`python -m catopt_xp`: the command line. Floor F6."""

from __future__ import annotations

import sys

from catopt_xp.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m catopt_xp"))
