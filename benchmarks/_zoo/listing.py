"""All families, in running order."""

from .build import of_transformers
from .case import Family
from .shapes import of_own_shape


def families() -> list[Family]:
    """Models with an unusual shape, then one for each architecture and head in transformers' mappings."""
    return [*of_own_shape(), *of_transformers()]
