"""The rooms as a data set: items are what is rendered, whoever reads them, and are rendered once."""

import hashlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.paper.data import Data, DataError, Options, open_data
from benchmarks.paper.data import rooms as module
from benchmarks.paper.data.images import MEAN, STD, colours
from benchmarks.paper.data.rooms import DEMO_TASKS, TASKS
from benchmarks.rooms import scenes as renderer
from benchmarks.rooms.batch import pack
from benchmarks.rooms.labels import CLASSES
from benchmarks.rooms.rooms import furnished_room
from benchmarks.rooms.scenes import render

SIZE = (24, 32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache: Path) -> Data:
    return opened(cache)


def opened(cache: Path, **options) -> Data:
    given = {"size": SIZE, "tasks": tuple(TASKS), "seed": 3, "train": 6, "val": 2, "cache": cache} | options
    return open_data("rooms", Options(**given))


def digest(data: Data) -> str:
    state = hashlib.sha256()
    for split in (data.train, data.val):
        for index in range(len(split)):
            for draw in (None, 0, 7):
                image, labels = split[index, draw]
                for values in (image, *labels.values()):
                    state.update(values.numpy().tobytes())
    return state.hexdigest()


# ---- what an item is


@pytest.mark.parametrize("split", ["train", "val"])
def test_items_are_what_is_rendered(data: Data, split: str) -> None:
    items = getattr(data, split)
    assert len(items) == {"train": 6, "val": 2}[split] and data.size == SIZE and data.vocabulary is None
    images, labels = render(range(len(items)), SIZE, 3, split)
    mean, std = (torch.from_numpy(values).view(3, 1, 1) for values in (MEAN, STD))
    for index, (image, want) in enumerate(zip(images, zip(*labels.values(), strict=True), strict=True)):
        read, of_tasks = items[index, None]
        assert torch.equal(read, (image - mean) / std) and read.dtype == torch.float32
        known = dict(zip(labels, want, strict=True))
        assert list(of_tasks) == list(TASKS) == list(CLASSES)
        for task, label in of_tasks.items():
            assert torch.equal(label, known[task]) and label.dtype == known[task].dtype, task
        np.testing.assert_allclose(colours(read.numpy()), image.numpy(), atol=1e-6)


def test_a_batch_is_its_items(data: Data) -> None:
    images, labels = data.train.batch([4, 0, 4])
    for row, index in enumerate([4, 0, 4]):
        image, alone = data.train[index, None]
        assert torch.equal(images[row], image)
        assert all(torch.equal(labels[task][row], label) for task, label in alone.items())


def test_a_draw_mirrors_or_not(data: Data) -> None:
    """What is to the left is to the right then, also of normals; nothing but index and draw decides which."""
    mirrored = []
    for index in range(6):
        image, labels = data.train[index, None]
        for draw in range(20):
            turned, seen = data.train[index, draw]
            is_mirrored = torch.equal(turned, image.flip(-1))
            mirrored.append(is_mirrored)
            assert is_mirrored != torch.equal(turned, image)
            for task, label in seen.items():
                want = labels[task]
                if is_mirrored and task != "edges":
                    want = want.flip(-1)
                    if task == "normals":
                        want = torch.stack([-want[0], want[1], want[2]])
                if task != "edges" or not is_mirrored:
                    assert torch.equal(label, want) and label.dtype == want.dtype, task
    assert 40 <= sum(mirrored) <= 80  # of 120


def test_edges_in_the_mirror_are_those_of_the_mirrored_faces(data: Data) -> None:
    height, width = SIZE
    x = (np.arange(height * width) % width + 0.5)[None].astype(np.float32)
    y = (np.arange(height * width) // width + 0.5)[None].astype(np.float32)
    for index in range(3):
        hit = renderer._look_at(pack([furnished_room(f"train/3/{index}")]), x, y, SIZE).hit
        face = np.stack([hit.solid, hit.face], -1).reshape(height, width, 2)[:, ::-1]
        want = np.zeros(SIZE, bool)
        want[:, :-1] |= (face[:, 1:] != face[:, :-1]).any(-1)
        want[:-1] |= (face[1:] != face[:-1]).any(-1)
        _, labels = data.train.batch([index], [True])
        assert (labels["edges"][0, 0].numpy() == want).all()
        assert not torch.equal(labels["edges"], data.train.batch([index])[1]["edges"].flip(-1))


def test_only_the_tasks_asked_for_in_the_table_s_order(cache: Path, data: Data) -> None:
    some = opened(cache, tasks=("parts", "depth"))
    assert list(some.tasks) == some.names == ["depth", "parts"] and list(some.train[0, 1][1]) == ["depth", "parts"]
    assert list(opened(cache, tasks=None).tasks) == list(DEMO_TASKS)


def test_losses_and_heads_fit_the_labels(data: Data) -> None:
    """A head's output of the table's channels is what loss and meter of every task take, and a perfect one is best."""
    _, labels = data.train.batch([0, 1, 2])
    for name, task in data.tasks.items():
        output = torch.randn(3, task.channels, *SIZE, requires_grad=True)
        loss = task.loss(output, labels[name])
        loss.backward()
        assert loss.dtype == torch.float32 and loss.shape == () and output.grad.abs().sum() > 0, name
        meter = task.meter()
        meter.update(output.detach(), labels[name])
        random = meter.compute()
        label = labels[name]
        if task.classes:
            known = label.clamp(max=task.channels - 1)
            perfect = 50 * torch.nn.functional.one_hot(known, task.channels).movedim(-1, 1).float()
        else:
            perfect = 100 * (label - 0.5) if name == "edges" else label
        meter.reset()
        meter.update(perfect, label)
        assert meter.compute() < random if task.lower_is_better else meter.compute() > random, name
        assert meter.compute() == pytest.approx(0 if task.lower_is_better else 100, abs=0.05), name


# ---- who reads it


def test_workers_and_pickles_read_the_same(data: Data) -> None:
    again = pickle.loads(pickle.dumps(data.train))
    assert len(pickle.dumps(data.train)) < 2000  # where the file is, and not what it holds
    keys = [(index, draw) for index in range(6) for draw in (None, 2)]
    worked = list(DataLoader(data.train, batch_size=None, sampler=keys, num_workers=2))
    for key, (image, labels) in zip(keys, worked, strict=True):
        for other, of_other in (data.train[key], again[key]):
            assert torch.equal(image, other) and all(torch.equal(labels[task], of_other[task]) for task in labels)


def test_the_file_is_mapped_and_not_read(data: Data) -> None:
    assert isinstance(data.train._records, np.memmap) and not data.train._records.flags.writeable


@pytest.mark.parametrize("index", [-1, 6])
def test_no_such_scene(data: Data, index: int) -> None:
    with pytest.raises(IndexError, match=rf"index must be in \[0, 6\), got {index}"):
        data.train[index, None]


# ---- the cache


def test_rendered_once_and_by_as_many_processes_as_wanted(
    cache: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert digest(opened(cache)) == digest(data) and len(before) == 2
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    monkeypatch.setattr(module, "_CHUNK", 2 * SIZE[0] * SIZE[1])  # so that there are several pieces, and workers
    torch.manual_seed(1)
    state = torch.get_rng_state()
    other = opened(tmp_path)
    assert digest(other) == digest(data)
    assert torch.equal(torch.get_rng_state(), state)  # nobody's numbers were drawn from
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in cache.iterdir()}


@pytest.mark.parametrize("other", [{"seed": 4}, {"size": (32, 24)}, {"train": 5}])
def test_other_options_are_other_scenes(cache: Path, data: Data, other: dict) -> None:
    changed = opened(cache, **other)
    assert changed.train.path != data.train.path
    same = changed.size == SIZE and torch.equal(changed.train[0, None][0], data.train[0, None][0])
    assert same == ("train" in other) and len(changed.train) == other.get("train", 6)


def test_a_changed_renderer_is_another_file(tmp_path: Path) -> None:
    folder = tmp_path / "rooms"
    shutil.copytree(Path(renderer.__file__).parent, folder)
    assert module.renderer(folder) == module.renderer() and len(module.renderer()) == 12
    shading = folder / "shading.py"
    shading.write_text(shading.read_text().replace("1.25", "1.26", 1))
    module.renderer.cache_clear()
    assert module.renderer(folder) != module.renderer()


def test_two_processes_at_once(cache: Path, data: Data, tmp_path: Path) -> None:
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
from {__name__} import digest, opened
print("ready", flush=True); input()
print(digest(opened(Path({str(tmp_path)!r}))))
"""
    start = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **start) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    printed = []
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        printed.append(process.communicate()[0].strip())
    assert printed == [digest(data)] * 2
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (data.train.path, data.val.path)}


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = opened(tmp_path, train=2, val=1).train.path
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-5], "other": content.replace(b"(2,)", b"(1,)"), "empty": b""}[damage])
    with pytest.raises(DataError, match=f"{path.name} .*Remove it to render it again"):
        opened(tmp_path, train=2, val=1)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/rooms-24x32-.*could not be written"):
        opened(tmp_path / "file")


def test_a_full_disk_is_named() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no device that is always full")
    with pytest.raises(OSError, match="No space left"):
        module._render(renderer.Scenes(1, SIZE, tasks=tuple(module._STORED)[1:]), Path("/dev/full"))


# ---- options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ("depth", "colour")}, "tasks must be among semseg, .*, albedo, got 'colour'"),
        ({"tasks": ()}, "got none"),
        ({"size": (64, 15)}, r"size must be \(height, width\), each at least 16 pixels, got \(64, 15\)"),
        ({"size": (64,)}, "size must be"),
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"val": -1}, "val must be at least 1, got -1"),
        ({"root": Path("/data")}, "root means nothing to the data set 'rooms'"),
        ({"tokenizer": "bert"}, "tokenizer means nothing to the data set 'rooms'.*bert"),
    ],
)
def test_bad_options_name_the_culprit(tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        opened(tmp_path, **options)
    assert not list(tmp_path.iterdir())
