"""A report's file holds all that the report does, and is refused where it is damaged; reports at several ratios."""

import json

import pytest
import torch

import dtme
from dtme.packing import pack, unpack
from tests.dtme.reports import made_up, numbers, other_split


def full_report():
    report = made_up([0.2, 0.4, 0.6], [0.6, 0.3, 0.2], widths=[4, 8, 8])
    return made_up(
        [0.2, 0.4, 0.6],
        [0.6, 0.3, 0.2],
        widths=[4, 8, 8],
        skipped={"depth": 2},
        settled=False,
        reached=torch.ones(3, 3, dtype=torch.bool),
        gains=torch.tensor([0.1, float("nan"), 1 / 3], dtype=torch.float64),
        gain_resamples=torch.rand(9, 3, dtype=torch.float64),
        bases=tuple(torch.linalg.qr(torch.randn(p, p, dtype=torch.float64))[0] for p in (4, 8, 8)),
        alternatives={1.0: other_split(report), 1000.0: other_split(report)._replace(ranks=report.ranks + 2)},
    )


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first.nan_to_num(7), second.nan_to_num(7))
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_everything_survives_the_file(tmp_path):
    report, path = full_report(), tmp_path / "report.json"
    for bases in (False, True):
        report.save(path, bases=bases)
        again = dtme.ConflictReport.load(path)
        for name in dtme.ConflictReport.__dataclass_fields__:
            if name not in ("_said", "bases"):
                assert same(getattr(again, name), getattr(report, name)), name
    assert all(torch.equal(a, b.float()) for a, b in zip(again.bases, report.bases, strict=True))
    report.save(path)
    without = dtme.ConflictReport.load(path)
    assert without.bases is None
    with pytest.raises(ValueError, match="has no bases"):
        without.save(path, bases=True)
    assert torch.equal(without.intervals("null"), report.intervals("null")) and str(without) == str(report)
    assert same(without.stability(), report.stability()) and without.groups() == report.groups()


def test_files_of_the_first_release_are_read(tmp_path):
    """Written before reports had units, gains and bases, and plans groups."""
    counts = [[[0, 3, 4], [3, 0, 5], [4, 5, 0]], [[0, 0, 1], [0, 0, 2], [1, 2, 0]]]
    possible = [[0, 10, 10], [10, 0, 10], [10, 10, 0]]
    report = {
        "format": "dtme.ConflictReport",
        "version": 1,
        "tasks": ["a", "b", "c"],
        "blocks": ["layers.0", "layers.1"],
    }
    report |= {"num_samples": 7, "ratio": 100.0, "ranks": [1, 2], "range_counts": counts, "null_counts": counts[::-1]}
    report |= {"valid_counts": [possible] * 2, "eigenvalues": [[2.0, 1.0], [3.0, 0.5, 0.25]]}
    plan = {"format": "dtme.ExpansionPlan", "version": 1, "tasks": ["a", "b", "c"], "num_tokens": 6}
    plan |= {"modulation": {"layers.0": ["a", "b", "c"]}, "expansion": {"layers.1": ["a", "b", "c"]}}
    plan |= {"num_features": {"layers.0": 2, "layers.1": 3}}
    for name, content in (("report", report), ("plan", plan)):
        (tmp_path / name).write_text(json.dumps(content))
    loaded = dtme.ConflictReport.load(tmp_path / "report")
    assert loaded.range_rates.tolist() == [0.4, 0.1] and loaded.num_features == {"layers.0": 2, "layers.1": 3}
    assert loaded.plan() == dtme.ExpansionPlan.load(tmp_path / "plan") and "40.0%" in str(loaded)
    assert loaded.stability()["modulation"].isnan().all() and loaded.gains.isnan().all() and loaded.bases is None
    loaded.save(tmp_path / "again")
    assert str(dtme.ConflictReport.load(tmp_path / "again")) == str(loaded)


def test_files_stay_readable_and_small(tmp_path):
    path = tmp_path / "report.json"
    report = made_up([0.3] * 12, [0.4] * 12, num_tasks=4, num_units=64)
    report.save(path)
    text = path.read_text()
    assert "NaN" not in text and len(text) < 60_000  # 14 thousand counts
    content = json.loads(text)
    assert content["num_batches"] == 64 and content["units"]["range"]["shape"] == [64, 12, 6]
    old = {k: content[k] for k in ("tasks", "blocks", "num_samples", "ratio", "ranks", "eigenvalues")}
    old |= {k: content[k] for k in ("format", "version", "range_counts", "null_counts", "valid_counts")}
    path.write_text(json.dumps(old))  # what earlier releases wrote
    again = dtme.ConflictReport.load(path)
    assert again.units is None and again.skipped == {} and again.gains.isnan().all() and again.ratios == (100.0,)
    assert again.plan() == report.plan()


def edited_units(content, name, edit):
    return content | {"units": content["units"] | {name: content["units"][name] | edit}}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c | {"units": {}}, "units: lacks the field 'batches'"),
        (lambda c: c | {"units": []}, "units must be a mapping with"),
        (lambda c: edited_units(c, "range", {"zlib": "AAAA"}), "units.range cannot be decompressed"),
        (lambda c: edited_units(c, "range", {"zlib": 3}), "units.range cannot be decompressed"),
        (lambda c: edited_units(c, "range", {"zlib": "%%"}), "units.range cannot be decompressed"),
        (lambda c: edited_units(c, "null", {"shape": [1, 3, 3]}), "units.null does not hold"),
        (lambda c: edited_units(c, "null", {"shape": [10**12, 3, 3]}), "units.null does not hold"),
        (lambda c: edited_units(c, "null", {"shape": [3, 16, 3]}), r"units.null must be \(16, 3, 3\)"),
        (lambda c: edited_units(c, "valid", {"dtype": "float32"}), "units.valid must hold"),
        (lambda c: edited_units(c, "valid", {"extra": 1}), "units.valid must hold"),
        (lambda c: edited_units(c, "valid", c["units"]["range"]), "units"),
        (lambda c: edited_units(c, "range", c["units"]["null"]), "units.range must add up"),
        (lambda c: edited_units(c, "batches", pack(torch.zeros(16).long())), "units.batches must be positive"),
        (lambda c: c | {"num_batches": 15}, "add up to num_batches, which is 15"),
        (lambda c: c | {"num_batches": "16"}, "num_batches"),
        (lambda c: c | {"range_counts": [[[0]]]}, "units.range adds up to counts of another shape"),
        (lambda c: c | {"skipped": {"pose": 1}}, r"skipped\['pose'\]"),
        (lambda c: c | {"skipped": {"depth": -1}}, r"skipped\['depth'\]"),
        (lambda c: c | {"skipped": [1]}, "skipped"),
        (lambda c: c | {"settled": "yes"}, "settled must be"),
        (lambda c: c | {"reached": [[True] * 3]}, "reached must be"),
        (lambda c: c | {"reached": [[1] * 3] * 3}, r"reached\[0\]\[0\] must be true or false"),
        (lambda c: c | {"reached": [[False] * 3] * 3}, "reached must be true where"),
        (lambda c: c | {"gains": [1.0]}, "gains must be one for each"),
        (lambda c: c | {"gains": ["a", 1, 2]}, r"gains\[0\] must be a number"),
        (lambda c: c | {"gain_resamples": pack(torch.zeros(4, 2))}, "gain_resamples must be"),
        (lambda c: c | {"bases": [pack(torch.eye(8))] * 3}, "bases must be"),
        (lambda c: c | {"alternatives": [{}]}, r"alternatives\[0\]: lacks the field"),
        (lambda c: c | {"alternatives": 3}, "damaged"),
        (lambda c: c | {"alternatives": [c["alternatives"][0] | {"ratio": -1}]}, r"\[0\].ratio must be a positive"),
        (lambda c: c | {"alternatives": [c["alternatives"][0] | {"ranks": [99] * 3}]}, r"alternatives\[1.0\].ranks"),
        (lambda c: c | {"alternatives": [c["alternatives"][0] | {"range_counts": [[[9] * 3] * 3] * 3}]}, "add up"),
        (lambda c: c | {"alternatives": [c["alternatives"][0] | {"range_units": None}]}, "or neither"),
        (lambda c: c | {"surprise": 1}, "unknown field 'surprise'"),
        (lambda c: c | {"plan_options": {"sort": 1}}, "plan_options: got an unexpected keyword argument 'sort'"),
        (lambda c: c | {"plan_options": {"modulation": [[1]]}}, "plan_options: modulation must be a share"),
        (lambda c: c | {"plan_options": [1]}, "plan_options must be a mapping"),
        (lambda c: c | {"ratio": 101.0}, "its checksum is that of other values"),
        (lambda c: c | {"checksum": "3"}, "its checksum is that of other values"),
        (lambda c: c | {"checksum": None}, "checksum must be a string"),
        (lambda c: c | {"version": 2, "release": "9.1"}, "version 2, written by release 9.1 after this .*: update"),
        (lambda c: c | {"version": 0}, "version 0, which no release wrote"),
        (lambda c: c | {"version": True}, "version True, which no release wrote"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(tmp_path, edit, says):
    path = tmp_path / "report.json"
    full_report().save(path)
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=says) as error:
        dtme.ConflictReport.load(path)
    assert "report.json" in str(error.value)


def test_packed_tensors_come_back():
    for tensor in (
        torch.tensor([[2**31, -5]]),
        torch.tensor([2**31 - 1, -(2**31)]),
        torch.zeros(0, 3, dtype=torch.int64),
        torch.tensor(7),
        torch.rand(3, 4).T,
        torch.rand(2, dtype=torch.float64),
    ):
        again = unpack(json.loads(json.dumps(pack(tensor))), "it", ("int32", "int64", "float32", "float64"))
        assert again.dtype == tensor.dtype and torch.equal(again, tensor)
    assert pack(torch.tensor([2**31 - 1]))["dtype"] == "int32" and pack(torch.tensor([2**31]))["dtype"] == "int64"


def test_a_report_at_another_ratio():
    report = full_report()
    assert report.ratios == (100.0, 1.0, 1000.0) and report.at(100) is report
    other = report.at(1)
    assert other.ratio == 1 and other.ratios[0] == 1 and set(other.ratios) == set(report.ratios)
    assert torch.equal(other.range_counts, report.null_counts) and torch.equal(other.ranks, report.ranks + 1)
    assert torch.equal(other.intervals("range"), report.intervals("null"))
    assert torch.equal(other.valid_counts, report.valid_counts) and torch.equal(other.gains[2], report.gains[2])
    assert other.plan().modulation == report.plan(strategy="swap").modulation
    back = other.at(100.0)
    assert torch.equal(back.range_counts, report.range_counts) and torch.equal(back.units.range, report.units.range)
    assert torch.equal(other.at(1000.0).ranks, report.ranks + 2)
    for unknown in (10, "1", None, [10], True):
        with pytest.raises(ValueError, match=r"ratios \[100.0, 1.0, 1000.0\]"):
            report.at(unknown)


def test_the_table_shows_whether_the_ratio_matters():
    report = full_report()
    lines = str(report).splitlines()
    start = next(k for k, line in enumerate(lines) if "by ratio" in line)
    table = {line.split()[0]: line.split()[1:] for line in lines[start + 2 : start + 5]}
    assert [(ratio, row[0]) for ratio, row in table.items()] == [("1", "2-2"), ("100", "1-1"), ("1000", "3-3")]
    plan = report.plan()
    letters = table["100"][1]
    assert [d for d in range(3) if letters[d] in "MB"] == numbers(plan.modulation)
    assert [d for d in range(3) if letters[d] in "EB"] == numbers(plan.expansion)
    assert "by ratio" not in str(made_up([0.3], [0.3]))


def test_units_that_do_not_add_up_are_refused_at_once():
    report = made_up([0.3], [0.3])
    units = report.units._replace(range=report.units.null)
    with pytest.raises(ValueError, match=r"units.range must add up"):
        made_up([0.3], [0.3], units=units)


def test_no_flipped_bit_of_a_report_loads_something_else(tmp_path):
    path = tmp_path / "report.json"
    made_up([0.3], [0.4], num_tasks=2, num_units=2, widths=2).save(path)
    data, want = path.read_bytes(), json.loads(path.read_text())
    refused = 0
    for place in range(0, len(data), 2):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 7]) + data[place + 1 :])
        try:
            dtme.ConflictReport.load(path).save(tmp_path / "again.json")
        except ValueError as error:
            assert type(error) is ValueError and "report.json" in str(error)
            refused += 1
        else:
            assert json.loads((tmp_path / "again.json").read_text()) == want, place
    assert refused > len(data) / 4


def test_edited_reports_are_read_where_the_edit_is_meant(tmp_path):
    path = tmp_path / "report.json"
    made_up([0.3], [0.4]).save(path)
    content = json.loads(path.read_text()) | {"ratio": 50.0}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="If the change is meant, delete its field 'checksum'"):
        dtme.ConflictReport.load(path)
    del content["checksum"]
    path.write_text(json.dumps(content))
    assert dtme.ConflictReport.load(path).ratio == 50.0


def test_options_without_limits_survive_the_file(tmp_path):
    options = {"max_compute": float("inf"), "pair_threshold": -float("inf")}
    report = made_up([0.3, 0.5], [0.4, 0.2], plan_options=options)
    report.save(tmp_path / "report.json")
    again = dtme.ConflictReport.load(tmp_path / "report.json")
    assert again.plan(**again.plan_options) == report.plan(**options)
