"""What a run did, read from its journal: one self-contained page."""

from .charts import Chart
from .page import write_report

__all__ = ["Chart", "write_report"]
