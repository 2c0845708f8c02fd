"""What a family's config needs beside small numbers by name."""

from __future__ import annotations

from typing import Any

# By model type, or by "model type | head". "make" builds the config itself.
EXCEPTIONS: dict[str, dict[str, Any]] = {}
