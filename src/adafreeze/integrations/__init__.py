"""What users add to their scripts, one module per library: ``adafreeze.integrations.transformers``."""
