"""What all tests share."""

import os

import pytest
import torch

from benchmarks.clients import import_torchvision

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are as many as the cores, and threads beyond that wait for each other

import_torchvision()


LONG = ("aot", "interpreted", "test_csrc", "test_installation")  # groups that take minutes, and so come first


@pytest.hookimpl(tryfirst=True)  # before that by which pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker of ``--dist loadgroup`` takes a file, or what a file has marked as a group of its own."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.name))
    items.sort(key=lambda item: not item.get_closest_marker("xdist_group").args[0].startswith(LONG))
