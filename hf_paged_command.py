"""The command `hf-paged` from its first moment on: outside of the package, whose imports take seconds."""

import sys


def main() -> int:
    """Run the command.

    Returns:
        The exit status; 130 if it is interrupted, while it is imported too.
    """
    try:
        from hf_paged.tools.cli import main as run
    except KeyboardInterrupt:
        print("hf-paged: Interrupted.", file=sys.stderr)
        return 128 + 2
    return run()
