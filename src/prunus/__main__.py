"""`python -m prunus` is `prunus`."""

from __future__ import annotations

import sys


def main() -> int:
    """The `prunus` command, with an answer for Ctrl-C while its modules are still being imported.

    Returns:
        The exit code, as `prunus.cli.main`.
    """
    try:
        from prunus.cli import main as command

        return command()
    except KeyboardInterrupt:
        print("prunus: Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
