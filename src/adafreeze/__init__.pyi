from . import decide
from ._version import __version__
from .config import SafeConfig
from .errors import AdafreezeError, AdafreezeWarning, ConfigError, DataError, ModelError, ProbeError, RunError
from .integrations.checkpoints import last_checkpoint
from .integrations.export import Export, export_config
from .integrations.transformers import SafeCallback
from .journal import Journal, read_journal
from .loop.safe import Safe
from .memory.lean import lean
from .memory.plan import Plan, plan
from .tasks.offloaded import from_pretrained

__all__ = [
    # In a script: a callback for Trainer and TRL, or an object for a loop of your own.
    "SafeCallback",
    "Safe",
    "SafeConfig",
    # For policies and scores of your own.
    "decide",
    # After a kill.
    "last_checkpoint",
    # Before a run: what it will hold and compute.
    "Plan",
    "plan",
    # A model of which only the upper blocks fit.
    "from_pretrained",
    # Fewer saved bytes in each LoRA layer.
    "lean",
    # What a run leaves.
    "Journal",
    "read_journal",
    # For the next one.
    "Export",
    "export_config",
    # What can go wrong.
    "AdafreezeError",
    "AdafreezeWarning",
    "ConfigError",
    "DataError",
    "ModelError",
    "ProbeError",
    "RunError",
    "__version__",
]
