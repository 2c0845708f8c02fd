"""Workers are not test modules: some need a library that is not installed."""

collect_ignore_glob = ["*worker.py", "_zero_trainer.py"]
