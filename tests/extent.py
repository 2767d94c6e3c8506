"""How much is tested: what CI has the time for, or, by ``make everything``, all there is."""

import os

EVERYTHING = os.environ.get("DTME_TESTS") == "everything"
