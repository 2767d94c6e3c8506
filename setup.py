"""Metadata lives in pyproject.toml. The optional C++ kernels of csrc/ are added here once there are any."""

from setuptools import setup

setup()
