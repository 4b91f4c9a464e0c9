"""``python -m fastgan``, as torchrun starts it: the command line."""

import sys

from fastgan.cli import main

sys.exit(main())
