"""The run journal: one writer and one reader."""

from .events import JOURNAL_FILE, Journal, read_journal
from .history import History, is_score, read_history

__all__ = ["JOURNAL_FILE", "History", "Journal", "is_score", "read_history", "read_journal"]
