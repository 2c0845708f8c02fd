"""All families, in the order in which they are run."""

from .build import of_transformers
from .case import Family
from .shapes import of_own_shape


def families() -> list[Family]:
    """Those with a shape of their own, and one for each architecture and head in transformers' mappings."""
    return [*of_own_shape(), *of_transformers()]
