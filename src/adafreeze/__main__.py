"""``python -m adafreeze``: for launchers that take a module (``torchrun -m adafreeze run script.py``)."""

import sys

from .cli.main import main

sys.exit(main())
