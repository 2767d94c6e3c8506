"""How an arm combines the losses of its tasks: one module per idea, and the arms that differ in nothing else."""

from functools import partial

from ..arms import Arm
from .aggregators import Aggregated, aligned, cagrad, config, graddrop, imtl, mgda, nash, pcgrad
from .igb import ImprovableGaps
from .rep_mtl import RepMTL
from .weights import DynamicWeightAverage, FastAdaptiveWeights, FixedWeights, UncertaintyWeights

__all__ = [
    "ARMS",
    "Aggregated",
    "DynamicWeightAverage",
    "FastAdaptiveWeights",
    "FixedWeights",
    "ImprovableGaps",
    "RepMTL",
    "UncertaintyWeights",
]

ARMS: dict[str, Arm] = {
    "single": Arm("Baseline (ST)", is_single=True),
    "joint": Arm("Baseline (MT)"),
    "invpt-weights": Arm("InvPT's weights", combination=FixedWeights),
    "graddrop": Arm("GradDrop", combination=partial(Aggregated, make=graddrop)),
    "mgda": Arm("MGDA", combination=partial(Aggregated, make=mgda)),
    "uw": Arm("UW", combination=UncertaintyWeights),
    "dwa": Arm("DWA", combination=DynamicWeightAverage),
    "pcgrad": Arm("PCGrad", combination=partial(Aggregated, make=pcgrad)),
    "cagrad": Arm("CAGrad", combination=partial(Aggregated, make=cagrad)),
    "imtl": Arm("IMTL", combination=partial(Aggregated, make=imtl)),
    "aligned": Arm("Align-MTL", combination=partial(Aggregated, make=aligned)),
    "nash": Arm("Nash-MTL", combination=partial(Aggregated, make=nash, degree=0)),
    "famo": Arm("FAMO", combination=FastAdaptiveWeights),
    "config": Arm("ConFIG", combination=partial(Aggregated, make=config)),
    "igb": Arm("IGB v1", combination=ImprovableGaps),
    "rep-mtl": Arm("Rep-MTL", combination=RepMTL),
}
"""By file-safe names, titles as the paper prints them; first those of its tables, in their order, then neighbours'."""
