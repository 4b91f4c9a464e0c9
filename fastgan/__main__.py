"""``python -m fastgan``, as torchrun starts it: the command line."""

import sys

from fastgan.cli import main

if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        from fastgan.launcher.command import main as run_script

        sys.exit(run_script(sys.argv[2:]))
    sys.exit(main())
