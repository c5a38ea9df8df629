"""Every test works in a cache of its own and offline, on one thread: the workers share the cores."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--run-behaviour", action="store_true", help="run the controlled experiments (minutes to hours)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--run-behaviour"):
        return
    skip = pytest.mark.skip(reason="an experiment: run it with `make behaviour`")
    for item in items:
        if "behaviour" in item.path.parts:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """The lab bases and prepared data of a test session live in its own folder, shared by parallel workers."""
    chosen = os.environ.get("LUTHIER_TEST_CACHE")
    if chosen is None:
        base = tmp_path_factory.getbasetemp()
        chosen = str((base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "cache")
    before = os.environ.get("LUTHIER_CACHE")
    os.environ["LUTHIER_CACHE"] = chosen
    yield
    if before is None:
        del os.environ["LUTHIER_CACHE"]
    else:
        os.environ["LUTHIER_CACHE"] = before
