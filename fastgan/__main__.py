"""``python -m fastgan``, as torchrun starts it: the command line."""

import sys

from fastgan.cli import main

if __name__ == "__main__":
    sys.exit(main())
