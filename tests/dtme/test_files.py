"""Files beside which a writer was killed, or is still writing."""

import os
import stat
import threading
import time

import pytest
from torch import nn

import dtme
from dtme import files

PLAN = dtme.ExpansionPlan(("a", "b"), 2, {"0": ("a",)})


def left_behind(folder, host=None, age=0.0):
    """What a process that was killed while it wrote leaves."""
    left = folder / f".dtme-{os.urandom(16).hex()}-{files._host() if host is None else host}"
    left.mkdir()
    for name in ("lock", "plan.json", ".tmpOfSomeWriter"):
        (left / name).write_text("half")
    then = time.time() - age
    for path in (*left.iterdir(), left):
        os.utime(path, (then, then))
    return left


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    dead, early = left_behind(tmp_path), tmp_path / f".dtme-{'0' * 32}-{files._host()}"
    early.mkdir()  # killed before it had a lock
    elsewhere, forgotten = left_behind(tmp_path, "another"), left_behind(tmp_path, "another", 2 * files.STALE)
    others = [tmp_path / name for name in (".dtme-mine", ".plan.json", ".tmpfile", f".dtme-{'0' * 32}")]
    others[0].mkdir()
    for path in others[1:]:
        path.write_text("of somebody else")
    PLAN.save(tmp_path / "plan.json")
    assert dtme.ExpansionPlan.load(tmp_path / "plan.json") == PLAN
    assert {*tmp_path.iterdir()} == {elsewhere, *others, tmp_path / "plan.json"}
    assert not (dead.exists() or early.exists() or forgotten.exists())


def test_what_is_still_being_written_is_left_alone(tmp_path):
    writing, go_on = threading.Event(), threading.Event()

    def write(beside):
        writing.set()
        assert go_on.wait(20)
        beside.write_text("the first")

    thread = threading.Thread(target=files.write_beside, args=(tmp_path / "first", write))
    thread.start()
    assert writing.wait(20)
    PLAN.save(tmp_path / "plan.json")
    go_on.set()
    thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "plan.json"]
    assert (tmp_path / "first").read_text() == "the first"


def test_many_savers_in_one_folder_do_not_take_each_other_for_dead(tmp_path):
    failed = []

    def save(name):
        try:
            for _ in range(25):
                PLAN.save(tmp_path / name)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(f"{k % 2}.json",)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json"]


@pytest.mark.parametrize("lost", ["fcntl", "flock"])
def test_without_locks_only_age_tells(tmp_path, monkeypatch, lost):
    def unsupported(*args):
        raise OSError(95, "not supported")

    if lost == "fcntl":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", unsupported)
    young, old = left_behind(tmp_path, age=60), left_behind(tmp_path, age=2 * files.STALE)
    PLAN.save(tmp_path / "plan.json")
    assert young.exists() and not old.exists() and (tmp_path / "plan.json").exists()


def test_files_are_as_readable_as_the_umask_lets_them_which_nobody_changes(tmp_path, monkeypatch):
    before = os.umask(0o027)
    monkeypatch.setattr(os, "umask", None)
    try:
        model = dtme.MultiTaskModel(nn.Linear(2, 2), {"a": nn.Linear(2, 2)})
        model.save_pretrained(tmp_path / "run")
        PLAN.save(tmp_path / "plan.json")
    finally:
        monkeypatch.undo()
        os.umask(before)
    written = [*(tmp_path / "run").iterdir(), tmp_path / "plan.json"]
    assert len(written) == 3 and {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o640}


def test_names_are_flushed_with_the_files(tmp_path, monkeypatch):
    """Also those of folders that were made for them."""
    flushed, fsync = [], os.fsync

    def note(handle):
        flushed.append(os.path.realpath(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", note)
    PLAN.save(tmp_path / "new" / "deeper" / "plan.json")
    folders = [str(tmp_path / "new"), str(tmp_path), str(tmp_path / "new" / "deeper")]
    assert [path for path in flushed if not path.endswith("plan.json")] == folders
    assert flushed[-1] == folders[-1] and flushed[-2].endswith("plan.json")
