"""What pickles of expanded models hold of this package, and how another release's are told from ours."""

from typing import Any

import dtme_kernels

LAYOUT = 1
"""Raised whenever the attributes of a ``Stamped`` class, or what they mean, change."""


class Stamp:
    """The first thing in a pickled object, so that it is read before anything that may have changed."""

    def __reduce__(self) -> Any:
        return _read_stamp, (LAYOUT, dtme_kernels.__version__)

    def __deepcopy__(self, memo: Any) -> "Stamp":
        return self


STAMP = Stamp()


class Stamped:
    """Pickles with the layout and the release that wrote it; ValueError where another layout is unpickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {"_stamp": STAMP, **self.__dict__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if state.pop("_stamp", None) is None:
            raise _refuse("an early release, which did not say so in its pickles,")
        above = getattr(super(), "__setstate__", self.__dict__.update)
        above(state)


def _read_stamp(layout: int, release: str) -> Stamp:
    if layout != LAYOUT:
        raise _refuse(f"release {release} of dtme-kernels (layout {layout})")
    return STAMP


def _refuse(writer: str) -> ValueError:
    return ValueError(
        f"this was pickled by {writer} and does not fit release {dtme_kernels.__version__} (layout {LAYOUT}): load it "
        "with the release that wrote it, save the model by save_pretrained (a plan or a report by save), and load that "
        "here. Those files are read by later releases too"
    )
