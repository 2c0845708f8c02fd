"""What a run did, read from its journal: one self-contained page."""

from .charts import Chart
from .history import History, read_history
from .page import write_report

__all__ = [
    "write_report",
    "History",
    "read_history",
    "Chart",
]
