"""The report of the signal: the page follows the numbers, and what is missing or damaged is named."""

import json

import pytest

from benchmarks.paper.__main__ import main
from benchmarks.paper.signal.findings import findings
from benchmarks.paper.signal.folder import file_name, read_folder
from benchmarks.paper.signal.page import section
from benchmarks.paper.signal.report import as_text
from benchmarks.paper.signal.tables import CLEAR, NOISE, OPEN, UNKNOWN, WEAK, images, verdict
from tests.paper.signal_folders import measurement, write_folder

SMALL = {"units": 256, "blocks": 4, "tasks": ("a", "b", "c"), "ratios": (1.0, 100.0), "batch": 16, "sample": 64}
SMALL["tokens"] = 32
STRONG = {"block": [0.06, -0.02, 0.03, -0.05], "pair": [0.1, -0.1, 0.0], "rate": 0.35}
CHANCE = {"rate": 0.5}


def setting(path, by_share, seeds=(0, 1), **options):
    """A folder of measurements: share -> effects."""
    found = [measurement(s, share, **(SMALL | options | effects)) for share, effects in by_share.items() for s in seeds]
    return write_folder(path, found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return setting(tmp_path_factory.mktemp("signal") / "rooms", {0.0: CHANCE, 0.25: STRONG})


@pytest.fixture(scope="module")
def found(folder):
    return findings(read_folder(folder))


def test_the_same_folders_give_the_same_bytes(folder, tmp_path, capsys):
    for name in ("first", "second"):
        assert main(["signal-report", str(folder), "--to", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / n / "report.md") for n in ("first", "second")]
    names = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert names == ["cells.png", "rates.png", "report.md", "samples.png", "signal.json", "tables.md", "variance.png"]
    for name in names:
        first, second = ((tmp_path / which / name).read_bytes() for which in ("first", "second"))
        assert first == second, name
        assert len(first) < 200_000
    content = json.loads((tmp_path / "first" / "signal.json").read_text())["settings"]
    assert len(content) == 1 and content[0]["seeds"] == [0, 1]
    digests = {f"{s}.{share:g}": read_folder(folder).load(s, share).digest for s in (0, 1) for share in (0, 0.25)}
    assert content[0]["digests"] == digests


def test_numbers_are_what_was_planted(found):
    trained, untrained = (found["by_share"][share] for share in ("0.25", "0"))
    for space in ("range", "null"):
        assert trained["rates"]["all"][space]["rate"][0] == pytest.approx(0.355, abs=0.01)
        low, high = trained["rates"]["all"][space]["difference"][1:]
        assert low < -0.145 < high
        low, high = untrained["rates"]["all"][space]["difference"][1:]
        assert low < 0 < high or abs(low + high) / 2 < 0.01
        blocks = [rate[0] for rate in trained["rates"]["blocks"][space]]
        assert blocks == pytest.approx([0.35 + effect for effect in STRONG["block"]], abs=0.012)
        assert trained["samples"]["blocks"][space]["64"]["overlap"][0] > 0.95
        assert trained["samples"]["pairs"][space]["64"]["correlation"][0] > 0.95
        assert trained["seeds"]["blocks"][space]["correlation"]["mean"][0] > 0.9
        assert trained["profiles"]["blocks"][space]["within"]["256"][1] > 0.9
        assert untrained["profiles"]["blocks"][space]["within"]["256"][1] == 0


def test_sentences_follow_the_numbers(found, tmp_path):
    text = section(found)
    assert "Order of blocks, within one model, 256 images. Range space: noise at 0 %; clear at 25 %." in text
    agree = "TM: no interval, as all agree or samples are too few, at"
    assert f"Plans of two samples of 128 images, against random ones. {agree}" in text
    # the planted rates are 30 to 41 % by block and 25 to 45 % by pair
    assert "4 of 4 blocks (4) in the range space, 3 of 3 pairs of tasks (3) in the range space" in text
    turned = setting(tmp_path / "turned", {0.0: STRONG, 0.25: CHANCE}, seeds=(0, 1, 2))
    text = section(findings(read_folder(turned)))
    assert "Order of blocks, within one model, 256 images. Range space: noise at 25 %; clear at 0 %." in text
    # of three pairs that have nothing in common nobody can say so
    assert "Order of pairs of tasks, common to all models. Range space: open at 25 %; clear at 0 %" in text
    assert "too few models" not in text


def test_warnings_tell_trained_from_untrained(found):
    warning = found["warning"]["64"]
    assert warning["samples"] == 4
    real, permuted = warning["warned"]["tokens"], warning["warned"]["permuted labels"]
    for criterion in ("at once", "mean", "apart"):
        assert real[criterion]["0.25"][0] == 0 and real[criterion]["0"][0] > 0.5
    # one of many intervals misses the rate by chance
    assert real["every"]["0.25"][0] == 0 < real["every"]["0"][0] <= real["at once"]["0"][0]
    assert permuted["at once"]["0.25"][0] > 0.5
    assert warning["separation"]["at once"] == pytest.approx(real["at once"]["0"][0])
    rates = warning["rates"]["mean rate"]
    assert rates["auc"][0] == 1 and rates["right"] == 1 and 0.37 < rates["threshold"] < 0.5


def test_what_is_missing_is_said_and_the_rest_is_reported(tmp_path):
    there = [measurement(s, share, **SMALL, **STRONG) for s, share in ((0, 0.1), (1, 0.1), (0, 0.5))]
    found = findings(read_folder(write_folder(tmp_path / "one", there, seeds=[0, 1, 2], shares=[0, 0.1, 0.5])))
    assert list(found["by_share"]) == ["0.1", "0.5"] and found["near"] == "0.1"
    assert found["by_share"]["0.5"]["seeds"] == {"models": 1}
    text = section(found)
    missing = ["seed 0 at 0 %", "seed 1 at 0 %", "seed 2 at 0 %", "seed 2 at 10 %", "seed 1 at 50 %", "seed 2 at 50 %"]
    assert sorted(found["missing"]) == sorted(missing) and "Not measured yet: " in text


def damaged(path, how):
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no measurement")
    else:  # a few bytes of the middle, which is compressed counts
        path.write_bytes(content[:2000] + bytes(50) + content[2050:])


@pytest.mark.parametrize("how", ["cut", "empty", "text", "flipped"])
def test_a_damaged_measurement_is_named(tmp_path, how):
    folder = setting(tmp_path / "one", {0.0: CHANCE}, seeds=(0,))
    file = folder / "measured" / file_name(0, 0.0)
    damaged(file, how)
    with pytest.raises(SystemExit, match=r"seed-0\.share-0\.npz is no measurement: .*Remove it"):
        main(["signal-report", str(folder), "--to", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


def test_what_does_not_belong_is_refused(tmp_path):
    folder = setting(tmp_path / "one", {0.0: CHANCE}, seeds=(0, 1))
    other = measurement(1, 0.0, **(SMALL | {"blocks": 5}))
    other.save(folder / "measured" / file_name(1, 0.0))
    with pytest.raises(ValueError, match=r"seed-1\.share-0\.npz has other blocks"):
        findings(read_folder(folder))
    measurement(3, 0.0, **SMALL).save(folder / "measured" / file_name(1, 0.0))
    with pytest.raises(ValueError, match=r"seed-1\.share-0\.npz is of seed 3"):
        findings(read_folder(folder))
    measurement(7, 0.0, **SMALL).save(folder / "measured" / file_name(7, 0.0))
    with pytest.raises(ValueError, match=r"seed-7\.share-0\.npz is of no seed and share"):
        read_folder(folder)
    content = json.loads((folder / "experiment.json").read_text())
    (folder / "experiment.json").write_text(json.dumps(content | {"experiment": "pilot"}))
    with pytest.raises(ValueError, match="'pilot', expected 'signal'"):
        read_folder(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "experiment.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no measurement yet"):
        read_folder(empty)


def test_the_largest_setting_stays_small(found):
    """A setting of 12 blocks, 6 pairs and 5 shares of the training, from the numbers of one share."""
    part = found["by_share"]["0.25"]
    assert len(as_text([found]).encode()) < 30_000
    assert len(json.dumps(part)) < 10_000


def test_numbers_of_images_and_verdicts_in_words():
    nan, inf = float("nan"), float("inf")
    assert images([300.2, 200, inf], 1000) == "301 [200, ∞]"
    assert images([3000, 2000, 4000], 1000) == "3,000† [2,000, 4,000]"
    assert images([inf, 2000, inf], 1000) == "not reached [2,000, ∞]"
    assert images([inf, inf, inf], 1000) == images([inf, nan, nan], 1000) == "not reached"
    cases = ([0.5, 0, 0.7], [0.5, 0, 0.9], [0.5, 0.1, 0.9], [0.85, 0.8, 0.9], [0.8, nan, nan])
    assert [verdict(of) for of in cases] == [
        NOISE,
        OPEN,
        WEAK,
        CLEAR,
        UNKNOWN,
    ]
