"""``python -m benchmarks.paper report``: what it writes, and what it refuses."""

import pytest

from benchmarks.paper.__main__ import main
from tests.paper.result_folders import ResultFolder, known, noisy_folder, rows, section


def write(folder, *options):
    """What the command writes: {file name: bytes}."""
    main(["report", str(folder.path), *options])
    return files(folder.path / "report")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_runs_make_the_same_bytes(tmp_path):
    folder = noisy_folder(tmp_path, {"joint": -4.0, "tm": 1.0}, range(3))
    first = write(folder)
    assert first.keys() == {
        "report.md",
        "report.json",
        "differences.png",
        "tasks.png",
        "conflicts.png",
        "losses.png",
    }
    main(["report", str(tmp_path), "--to", str(tmp_path / "elsewhere")])
    assert files(tmp_path / "elsewhere") == first
    for name in first:
        assert name.endswith((".md", ".json")) or f"({name})" in first["report.md"].decode()


def test_a_picture_that_is_no_longer_drawn_is_removed(tmp_path):
    folder = noisy_folder(tmp_path, {"joint": -4.0, "tm": 1.0}, range(2), singles=False)
    assert "differences.png" in write(folder)
    for seed in range(2):
        (tmp_path / "runs" / f"tm.seed-{seed}.json").unlink()
    left = write(folder)
    assert left.keys() == {"report.md", "report.json", "conflicts.png", "losses.png"}
    assert b"differences.png" not in left["report.md"]


def test_table_alone(tmp_path, capsys):
    folder = known(tmp_path, {"joint": -4.0, "tm": -1.0})
    main(["report", str(tmp_path), "--table"])
    printed = capsys.readouterr().out.strip()
    assert not (tmp_path / "report").exists()
    page = write(folder)["report.md"].decode()
    assert section(page, "Arms").strip().startswith(printed) and set(rows(printed)) == {"single", "joint", "tm"}


def test_several_folders_get_a_page_each(tmp_path, capsys):
    for name in ("a", "b"):
        known(tmp_path / name, {"joint": -4.0}, [0])
    main(["report", str(tmp_path / "a"), str(tmp_path / "b")])
    assert capsys.readouterr().out.split() == [str(tmp_path / name / "report" / "report.md") for name in ("a", "b")]
    with pytest.raises(SystemExit, match="--to is for one folder, got 2"):
        main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--to", str(tmp_path / "c")])


def refused(folder, *options):
    with pytest.raises(SystemExit) as error:
        main(["report", str(folder.path), *options])
    assert not (folder.path / "report").exists()
    return str(error.value)


def test_no_experiment_and_no_runs(tmp_path):
    folder = ResultFolder(tmp_path / "out", ["joint"])
    assert "runs holds no run that ended" in refused(folder)
    (folder.path / "experiment.json").unlink()
    assert "holds no experiment.json" in refused(folder)


@pytest.mark.parametrize("name", ["experiment.json", "runs/joint.seed-0.json"])
def test_a_file_that_is_no_json_or_of_another_format_is_named(tmp_path, name):
    folder = known(tmp_path, {"joint": -4.0})
    (tmp_path / name).write_text('{"format": 1, "arms"')
    assert f"{tmp_path / name} is no JSON" in refused(folder)
    (tmp_path / name).write_text('{"format": 2}')
    assert f"{tmp_path / name} has format 2" in refused(folder)
    (tmp_path / name).write_text('{"format": 1}')
    assert "is missing" in refused(folder) or "has arm, task and seed" in refused(folder)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    folder = known(tmp_path, {"joint": -4.0}, [0])
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(folder, "--to", str(tmp_path / "file" / "report"))


def test_a_baseline_that_is_no_arm(tmp_path):
    folder = known(tmp_path, {"joint": -4.0, "tm": 1.0})
    assert "--baseline te" in (message := refused(folder, "--baseline", "te")) and "single, joint, tm" in message


@pytest.mark.parametrize(
    ("arm", "seed", "changes", "message"),
    [
        (
            "joint",
            0,
            {"metrics": {"semseg": 1.0, "depth": 1.0, "smell": 1.0}},
            "of task 'smell', expected one of semseg",
        ),
        ("joint", 0, {"losses": {"smell": [1.0]}}, "of task 'smell'"),
        ("joint", 0, {"metrics": {"semseg": 1.0}}, "is done and has no metric of task 'depth'"),
        ("joint", 0, {"metrics": {"semseg": "good", "depth": 1.0}}, "has 'good' as the metric of task 'semseg'"),
        ("joint", 0, {"status": "lost"}, "has status 'lost', expected one of done, diverged"),
        ("joint", 0, {"facts": None}, "facts is None"),
        ("joint", 9, {}, "has seed 9, expected one of 0, 1"),
        ("other", 0, {}, "has arm 'other', expected one of single, joint"),
        ("joint", 0, {"task": "smell", "losses": {}}, "has task 'smell', expected one of semseg, depth"),
        ("joint", 0, {"task": "depth"}, "some runs of 'joint' are of one task, some of all"),
    ],
)
def test_a_run_that_does_not_belong(tmp_path, arm, seed, changes, message):
    folder = known(tmp_path, {"joint": -4.0}, range(2))
    folder.run(arm, seed, **changes)
    assert message in refused(folder)


def test_a_run_that_is_there_twice(tmp_path):
    folder = known(tmp_path, {"joint": -4.0}, range(2))
    (tmp_path / "runs" / "joint.copy.json").write_bytes((tmp_path / "runs" / "joint.seed-1.json").read_bytes())
    assert "joint.seed-1.json is there twice" in refused(folder)
