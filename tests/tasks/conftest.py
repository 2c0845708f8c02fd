from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path_factory, monkeypatch):
    """The cache key of ``datasets`` is the name and age of a file: use a new cache folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
