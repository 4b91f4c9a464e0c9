"""The command `fastgan`. It is outside the package so that Ctrl-C works during the seconds of importing PyTorch."""

import sys
import warnings


def main() -> int:
    # PyTorch warns if NumPy is missing. Only commands that read data need NumPy, and they report it themselves.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    try:
        from fastgan.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("\nfastgan: interrupted", file=sys.stderr)
        return 130
