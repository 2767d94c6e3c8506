"""What all tests share."""

import os

import torch

from benchmarks.clients import import_torchvision

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are as many as the cores, and threads beyond that wait for each other

import_torchvision()
