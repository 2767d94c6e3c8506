"""How the model of an arm is built: ours in all its placements, and its rivals. A row of ``ARMS`` is one arm."""

from functools import partial

from dtme.rivals import BitFit, LoRA, NormAffine, Prompts

from ..arms import RATIOS, Arm
from ..combinations.aggregators import Aggregated, imtl
from .controls import Frozen, Longer
from .equal_size import OfEqualSize
from .one_block import OneBlock
from .placements import Placement
from .recon import Recon

__all__ = ["ARMS", "SINGLES", "Frozen", "Longer", "OfEqualSize", "OneBlock", "Placement", "Recon"]

MOST_BLOCKS = 12
"""With an arm for each of them alone."""

METHOD = {
    "tm": Arm("TM", partial(Placement, expansion=0)),
    "te": Arm("TE", partial(Placement, modulation=0)),
    "tm+te": Arm("TM + TE", Placement),
}
PLACES = {
    "gains": Arm("TM + TE, by gains", partial(Placement, strategy="gain")),
    "pairs": Arm("TM + TE, by pairs", partial(Placement, strategy="pairs")),
    "random": Arm("TM + TE, random blocks", partial(Placement, strategy="random")),
    **{
        f"random-{n}": Arm(f"TM + TE, random blocks {n}", partial(Placement, strategy="random", draw=n - 1))
        for n in range(2, 9)
    },
    "reverse": Arm("TM + TE, reverse", partial(Placement, strategy="reverse")),
    "swap": Arm("TM + TE, swapped", partial(Placement, strategy="swap")),
    "first-half": Arm("TM + TE, first blocks", partial(Placement, strategy="first")),
    "last-half": Arm("TM + TE, last blocks", partial(Placement, strategy="last")),
    "all": Arm("TM + TE, all blocks", partial(Placement, 1, 1, strategy="first")),
}
ABLATIONS = {
    "frozen": Arm("TM + TE, backbone frozen", partial(Placement, freeze_backbone=True)),
    "batch-norm": Arm("TM + TE, batch norm", partial(Placement, modulator="batch_norm")),
    "t-1": Arm("TM + TE, 1 token", partial(Placement, num_tokens=1)),
    **{f"r-{r:g}": Arm(f"TM + TE, r = {r:g}", partial(Placement, ratio=r)) for r in RATIOS if r != 100},
    **{f"share-{p}": Arm(f"TM + TE, {p} % of blocks", partial(Placement, p / 100, p / 100)) for p in (25, 75)},
    **{f"after-{p}": Arm(f"TM + TE after {p} %", Placement, start=p / 100) for p in (0, 25, 50, 75)},
}
"""100 % of the blocks is ``all``."""
SINGLES = {
    f"{short}-at-{index}": Arm(f"{short.upper()} in block {index}", partial(OneBlock, kind, index))
    for short, kind in (("tm", "modulation"), ("te", "expansion"))
    for index in range(MOST_BLOCKS)
}
"""Modulation, then task tokens, in one block; not every backbone has as many."""
CONTROLS = {
    "longer": Arm("joint, at the compute of TM + TE", Longer),
    "joint-frozen": Arm("joint, backbone frozen", Frozen),
    "imtl-after-50": Arm("IMTL after 50 %", combination=partial(Aggregated, make=imtl), start=0.5),
    "imtl+tm+te": Arm("IMTL, TM + TE after 50 %", Placement, partial(Aggregated, make=imtl), start=0.5),
    "grouped": Arm("TM + TE, two groups of tasks", partial(Placement, max_groups=2)),
}
RIVALS = {
    "shared": Arm("TM + TE, shared by all tasks", partial(Placement, shared=True)),
    "lora": Arm("LoRA per task", partial(OfEqualSize, LoRA)),
    "bitfit": Arm("BitFit per task", partial(OfEqualSize, BitFit)),
    "norm-affine": Arm("norms per task", partial(OfEqualSize, NormAffine)),
    "prompts": Arm("deep prompts per task", partial(OfEqualSize, Prompts)),
    "recon": Arm("Recon", Recon),
}

ARMS: dict[str, Arm] = {**METHOD, **PLACES, **ABLATIONS, **SINGLES, **CONTROLS, **RIVALS}
