"""What all tests share."""

from benchmarks.clients import import_torchvision

import_torchvision()
