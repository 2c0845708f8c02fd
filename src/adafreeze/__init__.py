"""adafreeze: selective adapter freezing for PEFT fine-tuning (SAFE, Son et al., NAACL 2025)."""

import lazy_loader

# The names in __init__.pyi come when they are used: torch and transformers take seconds to import.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
