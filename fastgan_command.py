"""The command `fastgan`. It is outside the package so that Ctrl-C works during the seconds of importing PyTorch."""

import sys
import warnings


def main() -> int:
    # PyTorch warns if NumPy is missing. Only commands that read data need NumPy, and they report it themselves.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    if sys.argv[1:2] == ["run"]:  # a script's own errors, and Ctrl-C in it, are the interpreter's to report
        from fastgan.launcher.command import main as run_script

        return run_script(sys.argv[2:])
    try:
        from fastgan.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("\nfastgan: interrupted", file=sys.stderr)
        return 130
