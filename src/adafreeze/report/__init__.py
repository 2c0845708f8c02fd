"""The report of runs: one self-contained HTML page."""

from .charts import Chart
from .page import write_report

__all__ = ["Chart", "write_report"]
