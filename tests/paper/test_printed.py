"""The paper's printed numbers: complete, in agreement with each other where they are, beside ours."""

import dataclasses
from importlib import import_module

import pytest

from benchmarks.paper.report import printed, printed_numbers
from benchmarks.paper.report.beside import entries, findings
from benchmarks.paper.report.command import compare, read_folder
from benchmarks.paper.report.page import page
from benchmarks.paper.report.printed import all_rows, check_delta_m, contradictions, half_unit
from benchmarks.paper.report.printed_numbers import ADDED, CONFLICTS, LOWER_IS_BETTER, TABLES
from dtme.comparison.delta import delta_m
from tests.paper.result_folders import ResultFolder, conflicts

NYUD = {
    "semseg": {"metric": "mIoU", "unit": "%", "lower_is_better": False},
    "depth": {"metric": "RMSE", "unit": "m", "lower_is_better": True},
    "normals": {"metric": "mErr", "unit": "°", "lower_is_better": True},
    "edge": {"metric": "odsF", "unit": "%", "lower_is_better": False},
}


def number(data, arm, task, backbone="ViT-T"):
    return next(r.metrics[task] for r in all_rows(data) if (r.arm, r.backbone) == (arm, backbone) and r.metrics)


def test_every_table_is_there():
    numbers = {table.number for tables in TABLES.values() for table in tables}
    assert numbers == {1, 2, 3, 7, 8, 9, 10, 11, 12, 13}  # and 14, which is of conflicts
    assert CONFLICTS["nyud"] == {"tm": ("-11.60", "-8.92"), "te": ("-4.64", "-15.44")}
    assert len(all_rows("taskonomy")) == 4 * 13
    assert {backbone: shares["tm+te"] for backbone, shares in ADDED["taskonomy"].items()} == {
        "ViT-T": "0.46",
        "ViT-S": "0.23",
        "ViT-B": "0.118",
        "ViT-L": "0.089",
    }


def test_numbers_stand_under_their_tasks():
    assert number("nyud", "tm+te", "depth") == "0.6370"
    assert number("pascal", "frozen", "edge") == "43.20"
    assert number("taskonomy", "nash", "S25D", "ViT-B") == "0.1624"
    assert number("taskonomy", "single", "PC", "ViT-L") == "0.7134"


@pytest.mark.parametrize("data", TABLES)
def test_printed_delta_m_follows_from_the_printed_metrics(data):
    checks = check_delta_m(data)
    with_delta = [r for r in all_rows(data) if r.delta_m and r.arm != "single"]
    # swap's metrics are not printed
    assert len(checks) == len(with_delta) - (data == "nyud")
    for check in checks:
        assert check.agrees, check
        assert check.low < check.recomputed < check.high
        assert check.high - check.low < 0.5


def test_recomputed_by_hand():
    (check,) = check_delta_m("pascal")
    by_hand = (66.18 / 67.96 + 56.29 / 58.90 + 83.41 / 83.76 - 15.26 / 15.65 + 47.00 / 47.70 - 3) / 5 * 100
    assert check.recomputed == pytest.approx(by_hand) and check.printed == -1.289
    single, joint = ({t: float(number("nyud", arm, t)) for t in NYUD} for arm in ("single", "joint"))
    total, _ = delta_m(joint, single, LOWER_IS_BETTER & NYUD.keys())
    assert total == pytest.approx(-6.03, abs=0.005)


def test_a_wrong_number_is_found(monkeypatch):
    (table, *others) = TABLES["pascal"]
    wrong = dataclasses.replace(table, rows=table.rows.replace("83.41", "83.21"))  # as in Tables 2, 11 and 12
    monkeypatch.setitem(printed_numbers.TABLES, "pascal", (wrong, *others))
    (check,) = check_delta_m("pascal")
    assert not check.agrees and check.recomputed == pytest.approx(-1.337, abs=5e-4)
    assert "Δm of tm+te (ViT-T) is -1.289 in Table 1" in findings("pascal")


def test_a_row_of_another_length_is_refused():
    table = dataclasses.replace(TABLES["nyud"][0], rows="single 1 2 3 -")
    with pytest.raises(ValueError, match="Table 1, single: 3 numbers for 4 tasks"):
        printed.rows(table)


def test_contradictions_of_the_paper_are_listed():
    assert contradictions("nyud") == ["edge of joint (ViT-T) is 55.30 in Table 1 and 56.38 in Table 7"]
    assert contradictions("pascal") == [
        f"saliency of tm+te (ViT-T) is 83.41 in Table 1 and 83.21 in Table {table}" for table in (2, 11, 12)
    ]
    assert contradictions("taskonomy") == []
    assert "4 of 4" in findings("nyud") and "56.38" in findings("nyud")


def test_half_unit():
    assert half_unit("0.673") == 0.0005 and half_unit("22.5") == 0.05 and half_unit("7") == 0.5


def test_rows_that_agree_are_one_entry():
    found = [e for e in entries("nyud") if e.arm == "tm+te"]
    assert [(e.tables, e.delta_m) for e in found] == [([1, 2, 7, 11, 12, 13], "0.044")]
    assert [(e.tables, e.metrics["edge"]) for e in entries("nyud") if e.arm == "joint"] == [
        ([1], "55.30"),
        ([7], "56.38"),
    ]
    assert [(e.tables, e.metrics["saliency"], e.delta_m) for e in entries("pascal") if e.arm == "tm+te"] == [
        ([1], "83.41", "-1.289"),
        ([2, 11, 12], "83.21", None),
    ]


def test_names_are_those_of_the_data_sets_and_arms():
    """Where these modules are, the printed numbers stand beside ours only if the names are the same."""
    for data, tables in TABLES.items():
        module = pytest.importorskip(f"benchmarks.paper.data.{data}")
        for table in tables:
            assert set(table.tasks) in (set(), set(module.TASKS)), (data, table.number)
        assert {t for t, task in module.TASKS.items() if task.lower_is_better} == LOWER_IS_BETTER & set(module.TASKS)
    arms = {}
    for package in ("structures", "combinations"):
        pytest.importorskip(f"benchmarks.paper.{package}")
        arms |= import_module(f"benchmarks.paper.{package}").ARMS
    assert {row.arm for data in TABLES for row in all_rows(data)} <= arms.keys()


# --- in the report ----------------------------------------------------------------------------------------------------


def make(path, data, tasks=NYUD, arms=("single", "joint", "tm")):
    folder = ResultFolder(path, arms, range(3), tasks, data, backbone="dinov2-small")
    if "single" in arms:
        folder.single()
    for seed in range(3):
        folder.run("joint", seed, -3.0)
        folder.run("tm", seed, 1.0 + seed, conflicts=conflicts((100, 200), (90, 150)))
    return page(compare(read_folder(path)), [])


def row(text, name):
    return [cell.strip() for cell in next(x for x in text.splitlines() if x.startswith(f"| {name} ")).split("|")[1:-1]]


def test_ours_stand_under_the_papers(tmp_path):
    text = make(tmp_path, "nyud").partition("## The paper's numbers")[2].partition("\n## ")[0]
    assert row(text, "tm")[:6] == ["tm", "1", "37.85", "0.6490", "21.75", "56.92"]
    ours = row(text, "ours: tm")
    assert ours[2].startswith("40.80 ± ") and ours[6].startswith("+2.00 ± 2.48")  # 1, 2, 3: sd 1, t(0.975, 2) = 4.303
    assert text.count("ours: joint") == 1 and "dinov2-small" in text and "56.38 in Table 7" in text
    changes = text.partition("(Table 14)")[2]
    assert row(changes, "tm") == ["tm", "-11.60", "-8.92"]
    assert row(changes, "ours: tm") == ["ours: tm", "-10.00 ± 0.00", "-25.00 ± 0.00"]


def test_other_data_gets_no_printed_number(tmp_path):
    text = make(tmp_path, "rooms")
    assert "The paper's numbers" not in text and "Table 14" not in text and "37.85" not in text


def test_another_set_of_tasks_or_reference_is_not_called_the_same(tmp_path):
    some = {task: NYUD[task] for task in ("semseg", "depth")}
    ours = row(make(tmp_path / "some", "nyud", some).partition("## The paper's numbers")[2], "ours: tm")
    assert ours[2].startswith("40.80") and ours[4:7] == ["–", "–", "–"]  # no Δm over other tasks
    text = make(tmp_path / "joint", "nyud", arms=("joint", "tm"))
    assert "they are not to be compared" in text
