"""The two speeds of the tests: in one process what needs no server, beside others all the rest."""

import sys

import pytest

# nbformat's dependency builds its parsers when it is imported, for seconds, and nobody needs them.
sys.modules["rfc3987_syntax"] = None

STARTERS = {"started", "server", "fresh", "full", "classroom", "browser", "chromium", "execute"}
STARTERS |= {"arena", "pair", "processes"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as live what a fixture starts something for. Notebooks take longest: they come first."""
    items.sort(key=lambda item: not item.name.startswith("test_a_notebook_shows"))
    for item in items:
        if STARTERS & set(item.fixturenames):
            item.add_marker("live")


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers(config):
    """Four at a time: much of a live test is waiting."""
    return 0 if "not live" in config.option.markexpr else 4
