"""What a run wrote down: one writer and one reader."""

from .events import Journal, find_journal, read_journal
from .history import History, read_history

__all__ = ["History", "Journal", "find_journal", "read_history", "read_journal"]
