"""What people add to a script they have; import the host's module: ``adafreeze.integrations.transformers``."""
