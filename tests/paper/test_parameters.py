"""The paper's parameter counts, from real modules, and what the search says about them."""

import copy

import pytest
import torch
from torch import nn

import dtme
from benchmarks.paper.__main__ import main
from benchmarks.paper.parameters import (
    BLOCKS,
    ROWS,
    Preset,
    build,
    check_added,
    encoder,
    heads_of,
    hits,
    percentages,
    plan_of,
    search_table,
    size,
)
from dtme.blocks import find_blocks
from dtme.rivals import Prompts

TASKONOMY = [row.benchmark == "Taskonomy" for row in ROWS]


def test_every_figure_of_the_paper_comes_out_and_rivals_are_of_its_size(capsys):
    main(["parameters"])
    lines = capsys.readouterr().out.splitlines()
    for row in ROWS:
        (first,) = [
            i
            for i, line in enumerate(lines)
            if line.startswith(f"{row.backbone} ") and f" {row.benchmark} " in line and " params " in line
        ]
        *_, added, percent, paper, difference = lines[first].split()
        assert percent == paper == row.percent and abs(float(difference)) < 5e-4
        for name, line in zip(("LoRA", "BitFit", "norm affine", "prompts"), lines[first + 1 :], strict=False):
            assert line.strip().startswith(name) and added in line.split()
            assert abs(float(line.split()[-1].rstrip("%"))) < 2


def test_counts_known_by_hand():
    nyud, pascal, *_, large = ROWS
    model = build(nyud)
    assert size(model) == 5_689_005 and size(model.backbone) == 5_680_320  # 28 × 36 patches and a class token
    assert all(parameter.is_meta for parameter in model.parameters())
    for plan in (plan_of(nyud, Preset(1 / 12, 1 / 12)), Prompts().plan(model, 4 * 192)):
        check_added("a plan", plan.added_parameters(), model, dtme.expand(copy.deepcopy(model), plan))
    assert plan_of(nyud, Preset(1 / 2, 1 / 2)).added_parameters() == 13_824
    assert plan_of(pascal, Preset(1 / 2, 1 / 2)).added_parameters() == 17_280
    assert plan_of(pascal, Preset(1 / 2, 1 / 2, per_task=False)).added_parameters() == 17_280 // 5
    assert len(find_blocks(encoder(large.backbone, large.benchmark))) == 24
    # a class token, and a position for it and for every patch
    assert size(encoder("vit-tiny", "NYUD-v2", "none")) == 5_680_320 - 192 * (1 + 28 * 36 + 1)
    assert size(heads_of(192, "NYUD-v2", "3×3, 1×1")) == 4 * (9 * 192**2 + 2 * 192) + 45 * 193


def test_a_count_that_modules_do_not_have_is_an_error():
    with pytest.raises(RuntimeError, match="LoRA says that it adds 7 parameters, and its modules have 6 more"):
        check_added("LoRA", 7, nn.Linear(1, 1), nn.Linear(3, 2))


def test_shares_and_tokens_decide_which_figures_come_out():
    by_share = {share: percentages(Preset(share, share)) for share in (1 / 2, 1 / 3)}
    for share, found in by_share.items():
        right = [hits(percent, row.percent) for percent, row in zip(found, ROWS, strict=True)]
        assert right == [BLOCKS[row.benchmark] == share for row in ROWS]
    six = percentages(Preset(1 / 2, 1 / 2, 6))
    assert not any(hits(percent, row.percent) for percent, row in zip(six, ROWS, strict=True))
    assert six[0] == pytest.approx(by_share[1 / 2][0] * 8 / 3)


def test_the_search_finds_no_definition_of_all_figures_and_some_of_each_part():
    head, _, _, _, *lines = search_table().splitlines()
    assert "; 0 of them give all 6 figures" in head and int(head.split()[0].replace(",", "")) > 3000
    marks = [[cell.endswith("*") for cell in line.split()[-len(ROWS) :]] for line in lines]
    assert all(mark in (TASKONOMY, [not one for one in TASKONOMY]) for mark in marks)
    assert TASKONOMY in marks and [not one for one in TASKONOMY] in marks
    assert any("TM 33%, TE 33% of blocks, t = 1, per task" in line and "1×1 " in line for line in lines)
    assert torch.tensor(marks).any(0).all()
