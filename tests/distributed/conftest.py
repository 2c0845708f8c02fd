"""Workers are no modules of tests: some need a host that is not there."""

collect_ignore_glob = ["*worker.py", "_zero_trainer.py"]
