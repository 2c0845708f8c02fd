"""``python -m adafreeze.cli``: for launchers that take a module (``torchrun -m adafreeze.cli train``)."""

import sys

from .main import main

sys.exit(main())
