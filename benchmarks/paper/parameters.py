"""The paper's parameter counts, and rivals of the same size: ``python -m benchmarks.paper parameters``.

Networks and rivals are built without values (torch's meta device) and counted: nothing is downloaded or trained. The
paper prints by how many per cent its method enlarges a network, and not what it counts. The preset ``params`` gives
every figure to its last digit; ``--search`` tries many other definitions and lists those that give some:

* The network is the encoder with positions for the data set's images, and a 1 × 1 convolution per task from the tokens
  to its channels. The 3 × 3 Conv-BN-ReLU decoders that the paper describes are not in it.
* One task token per task and block, though the text says six: with six, and TM in as many blocks as TE, no figure comes
  out (the preset ``text`` shows what does).
* TM and TE in half of the blocks on NYUD-v2 and PASCAL-Context, but in a third of them on Taskonomy: no one share gives
  all six figures. A count only says how many parameters a block adds on average: 1.5 p per task, and p on Taskonomy,
  for a width of p. TM alone in three quarters and in half of the blocks would be as many, or six tokens in a quarter
  and in a sixth of them without any TM.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

import dtme
from dtme.blocks import find_blocks
from dtme.plan import NUM_TOKENS
from dtme.rivals.adapters import BitFit, LoRA, NormAffine, Prompts, Rival, width_of
from dtme.rivals.units import deviation
from dtme.tables import aligned, ruled

from .data import nyud, pascal, taskonomy
from .models import load_backbone


class Benchmark(NamedTuple):
    """A data set as far as it decides how many parameters a network has."""

    size: tuple[int, int]
    """Of its images after padding, in pixels."""
    channels: dict[str, int]
    """Of every task's output."""


BENCHMARKS = {
    name: Benchmark(data.SIZE, {task: info.channels for task, info in data.TASKS.items()})
    for name, data in (("NYUD-v2", nyud), ("PASCAL-Context", pascal), ("Taskonomy", taskonomy))
}


class Row(NamedTuple):
    """A figure of the paper."""

    backbone: str
    benchmark: str
    percent: str
    """By how much the network grows, to three digits; the paper rounds the first four to 0.24, 0.30, 0.46 and 0.23."""


ROWS = (
    Row("vit-tiny", "NYUD-v2", "0.243"),
    Row("vit-tiny", "PASCAL-Context", "0.304"),
    Row("vit-tiny", "Taskonomy", "0.458"),
    Row("vit-small", "Taskonomy", "0.234"),
    Row("vit-base", "Taskonomy", "0.118"),
    Row("vit-large", "Taskonomy", "0.089"),
)
BLOCKS = {"NYUD-v2": 1 / 2, "PASCAL-Context": 1 / 2, "Taskonomy": 1 / 3}
"""Share of the blocks that get TM, and that get TE, by which the figures come out."""


@dataclass(frozen=True)
class Preset:
    """What is added to a network, and what it is measured against.

    Args:
        modulation: share of the blocks.
        expansion: share of the blocks.
        num_tokens: t.
        per_task: whether every task has its own; else all share one set.
        heads: a key of ``HEADS``.
        positions: ``"data"`` for the images of the data set, ``"224"`` for those of ImageNet, or ``"none"``.
    """

    modulation: float
    expansion: float
    num_tokens: int = 1
    per_task: bool = True
    heads: str = "1×1"
    positions: str = "data"

    def __str__(self) -> str:
        whose = "per task" if self.per_task else "shared"
        return f"TM {self.modulation:.0%}, TE {self.expansion:.0%} of blocks, t = {self.num_tokens}, {whose}"


VERSIONED: dict[str, type[Rival]] = {"LoRA": LoRA, "BitFit": BitFit, "norm affine": NormAffine}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--search", action="store_true", help="also try all other definitions on all rows")


def run(args: argparse.Namespace) -> None:
    print(table())
    if args.search:
        print(f"\n{search_table()}")


# --- counting ---------------------------------------------------------------------------------------------------------


def head_1x1(width: int, channels: int) -> nn.Module:
    return nn.Conv2d(width, channels, 1)


def head_of_taps(width: int, channels: int) -> nn.Module:
    """On the tokens of four blocks together."""
    return nn.Conv2d(4 * width, channels, 1)


def head_3x3(width: int, channels: int) -> nn.Module:
    """One 3 × 3 Conv-BN-ReLU, straight to the channels."""
    return nn.Sequential(nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


def head_3x3_1x1(width: int, channels: int) -> nn.Module:
    """One 3 × 3 Conv-BN-ReLU of the tokens' width, then a 1 × 1."""
    mix = nn.Conv2d(width, width, 3, padding=1, bias=False)
    return nn.Sequential(mix, nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 1))


def no_head(width: int, channels: int) -> nn.Module:
    return nn.Identity()


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": no_head,
    "1×1": head_1x1,
    "1×1 of 4 taps": head_of_taps,
    "3×3": head_3x3,
    "3×3, 1×1": head_3x3_1x1,
}
POSITIONS = ("data", "224", "none")


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def encoder(backbone: str, benchmark: str, positions: str = "data") -> nn.Module:
    """A backbone without values; callers copy it before they change it."""
    image = BENCHMARKS[benchmark].size if positions == "data" else (224, 224)
    with torch.device("meta"):
        network = load_backbone(backbone, image, None)
    if positions == "none":
        embeddings = network.get_submodule("embeddings")
        del embeddings.position_embeddings, embeddings.cls_token
    return network


@cache
def heads_of(width: int, benchmark: str, kind: str = "1×1") -> nn.ModuleDict:
    """A head per task without values."""
    with torch.device("meta"):
        return nn.ModuleDict({t: HEADS[kind](width, count) for t, count in BENCHMARKS[benchmark].channels.items()})


def build(row: Row) -> dtme.MultiTaskModel:
    """A network without values."""
    network = copy.deepcopy(encoder(row.backbone, row.benchmark))
    return dtme.MultiTaskModel(network, heads_of(width_of(network), row.benchmark))


def plan_of(row: Row, preset: Preset) -> dtme.ExpansionPlan:
    """Of the first blocks: which they are makes no difference to their number of parameters."""
    network, tasks = encoder(row.backbone, row.benchmark), tuple(BENCHMARKS[row.benchmark].channels)
    blocks = tuple(find_blocks(network))
    modulated, expanded = (
        dict.fromkeys(blocks[: max(1, round(share * len(blocks))) if share else 0], tasks)
        for share in (preset.modulation, preset.expansion)
    )
    widths = dict.fromkeys(blocks, width_of(network))
    groups: dict[str, tuple[str, ...]] = {} if preset.per_task else {"all": tasks}
    return dtme.ExpansionPlan(tasks, preset.num_tokens, modulated, expanded, widths, groups)


# --- the table --------------------------------------------------------------------------------------------------------


def table() -> str:
    """For every row both presets beside the paper's figure, and every rival at the size of ``params``."""
    rows = [["model", "data", "K", "preset", "encoder", "heads", "added", "retired", "%", "paper's %", "difference"]]
    for row in ROWS:
        rows += _cells(row)
    notes = [
        "",
        "params, text: TM and TE with one and with six tokens per task and block, in 1/2 of the blocks (NYUD-v2,",
        "PASCAL-Context) or 1/3 (Taskonomy). %: added over encoder and heads. difference: from the paper's figure in",
        "percentage points; of a rival, from the size of params. retired: shared parameters that the copies of all",
        "tasks take the place of.",
    ]
    return "\n".join([*ruled(aligned(rows, "<<><>>>>>>>")), *notes])


def _cells(row: Row) -> Iterator[list[str]]:
    model = build(row)
    whole, share = size(model), BLOCKS[row.benchmark]
    numbers = [f"{size(model.backbone):,}", f"{size(model.heads):,}"]
    for name, tokens in NUM_TOKENS.items():
        added = plan_of(row, Preset(share, share, tokens)).added_parameters()
        percent = 100 * added / whole
        difference = f"{percent - float(row.percent):+.4f}"
        start = [row.backbone, row.benchmark, str(len(model.tasks)), name, *numbers]
        yield [*start, f"{added:,}", "", f"{percent:.3f}", row.percent, difference]
        if name == "params":
            for rival, (count, retired) in rivals(model, added).items():
                cells = [f"{count:,}", f"{retired:,}" if retired else "", f"{100 * count / whole:.3f}"]
                yield ["", "", "", rival, "", "", *cells, "", f"{deviation(count, added):+.2%}"]


def rivals(model: dtme.MultiTaskModel, budget: int) -> dict[str, tuple[int, int]]:
    """``{rival: (parameters that it adds, and that it retires)}`` at the size of ``budget``."""
    found = {}
    for name, rival in VERSIONED.items():
        built, facts = rival().fit(copy.deepcopy(model), budget, seed=0)
        check_added(name, facts["added"], model, built)
        found[name] = facts["added"], facts["retired"]
    # expanding tries every block, which takes seconds without values
    return found | {"prompts": (Prompts().plan(model, budget).added_parameters(), 0)}


def check_added(name: str, added: int, model: nn.Module, built: nn.Module) -> None:
    """Whether the modules of ``built`` have as many more parameters than those of ``model`` as ``name`` says."""
    if (count := size(built) - size(model)) != added:
        raise RuntimeError(f"{name} says that it adds {added:,} parameters, and its modules have {count:,} more")


# --- other definitions ------------------------------------------------------------------------------------------------

SHARES = (0.0, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1.0)


def hits(percent: float, printed: str) -> bool:
    """Whether ``percent`` is what is printed, to its last digit."""
    return f"{percent:.{len(printed.partition('.')[2])}f}" == printed


def percentages(preset: Preset) -> tuple[float, ...]:
    """Of every row of ``ROWS``."""
    added = _added(preset.modulation, preset.expansion, preset.num_tokens, preset.per_task)
    return tuple(
        100 * count / _whole(row, preset.heads, preset.positions) for count, row in zip(added, ROWS, strict=True)
    )


@cache
def _added(modulation: float, expansion: float, num_tokens: int, per_task: bool) -> tuple[int, ...]:
    preset = Preset(modulation, expansion, num_tokens, per_task)
    return tuple(plan_of(row, preset).added_parameters() for row in ROWS)


@cache
def _whole(row: Row, heads: str, positions: str) -> int:
    network = encoder(row.backbone, row.benchmark, positions)
    return size(network) + size(heads_of(width_of(network), row.benchmark, heads))


def search() -> Iterator[tuple[Preset, tuple[float, ...]]]:
    """Every definition that was tried, and what it gives for every row."""
    for shares in product(SHARES, SHARES):
        for tokens, per_task, heads, positions in product((1, 6), (True, False), HEADS, POSITIONS):
            if any(shares) and (shares[1] or tokens == 1):  # without TE, t means nothing
                preset = Preset(*shares, tokens, per_task, heads, positions)
                yield preset, percentages(preset)


def search_table() -> str:
    """The definitions that give all figures of Taskonomy, or both others; the figures that one gives are marked."""
    tried = list(search())
    rows = [["modules", "heads", "positions", *(f"{row.backbone} {row.benchmark}" for row in ROWS)]]
    both = 0
    for preset, found in tried:
        right = [hits(percent, row.percent) for percent, row in zip(found, ROWS, strict=True)]
        of_taskonomy = [hit for hit, row in zip(right, ROWS, strict=True) if row.benchmark == "Taskonomy"]
        both += all(right)
        if all(of_taskonomy) or sum(right) - sum(of_taskonomy) == len(ROWS) - len(of_taskonomy):
            cells = [f"{percent:.4f}{'*' if hit else ' '}" for percent, hit in zip(found, right, strict=True)]
            rows.append([str(preset), preset.heads, preset.positions, *cells])
    head = (
        f"{len(tried):,} definitions were tried; {both} of them give all {len(ROWS)} figures (* what is given exactly)"
    )
    return "\n".join([head, "", *ruled(aligned(rows, "<<<" + ">" * len(ROWS)))])
