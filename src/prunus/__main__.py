"""`python -m prunus` is `prunus`."""

from __future__ import annotations

import sys

from prunus.cli import main

if __name__ == "__main__":
    sys.exit(main())
