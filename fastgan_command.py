"""The command `fastgan`, outside of the package: importing that takes PyTorch's seconds, and Ctrl-C may come then."""

import sys
import warnings


def main() -> int:
    # PyTorch says so where there is no NumPy, which of all commands only those with data need: they say it themselves.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    try:
        from fastgan.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("\nfastgan: interrupted", file=sys.stderr)
        return 130
