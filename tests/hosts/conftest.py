"""The models need libraries that are not in the main environment."""

collect_ignore = ["sentence_cases.py"]
