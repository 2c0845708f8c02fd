"""The models need a library that is not in the main environment."""

collect_ignore = ["hub_cases.py"]
