"""The data sets of the evaluation: ``open_data(name, options)``; each is a module of this package and a row here."""

from importlib import import_module

from .dataset import Data, DataError, Input, Item, Items, Options

DATA_SETS = {
    "rooms": "rendered rooms, as many and as large as wanted; nothing to download",
    "fashion": "two garments of Fashion-MNIST overlaid",
    "wordnet": "glosses of WordNet: part of speech, lexicographer file, depth",
    "nyud": "NYUD-v2",
    "pascal": "PASCAL-Context",
    "taskonomy": "Taskonomy (tiny)",
}
"""Name of the module, which has ``open_data(options) -> Data`` and ``TASKS``, and what it is."""

__all__ = ["DATA_SETS", "Data", "DataError", "Input", "Item", "Items", "Options", "open_data"]


def open_data(name: str, options: Options) -> Data:
    """A data set by its name.

    Raises:
        ValueError: no such data set, or an option that is out of its range for it.
        DataError: files are missing or hold something else than they should; the message names them.
    """
    if name not in DATA_SETS:
        raise ValueError(f"data must be one of {', '.join(DATA_SETS)}, got {name!r}")
    return import_module(f".{name}", __name__).open_data(options)
