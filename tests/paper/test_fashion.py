"""Multi-Fashion: pairs of garments from small idx files, and what is said of damaged ones."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.paper.data import Data, DataError, Options, open_data
from benchmarks.paper.data.fashion import GARMENTS, KINDS, TASKS
from benchmarks.paper.data.images import colours

COUNTS = {"train": 30, "t10k": 12}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def garments(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Every image is told by its middle pixel; its border is black, as that of the real ones."""
    random = np.random.default_rng(len(part))
    images = np.zeros((COUNTS[part], 28, 28), np.uint8)
    images[:, 2:26, 2:26] = random.integers(0, 256, (COUNTS[part], 24, 24))
    images[:, 14, 14] = np.arange(COUNTS[part]) + 1
    return images, random.integers(0, 10, COUNTS[part]).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part in COUNTS:
        images, labels = garments(part)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def opened(root: Path, **options) -> Data:
    return open_data("fashion", Options(root=root, **options))


def pictures(items, margin: int = 2) -> list[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Canvases of bytes, without their margin, and labels."""
    found = []
    for index in range(len(items)):
        image, labels = items[index, None]
        bytes_ = colours(image.numpy()) * 255
        assert np.abs(bytes_ - bytes_.round()).max() < 1e-3 and (bytes_[0].round() == bytes_[2].round()).all()
        found.append((bytes_[0].round().astype(np.uint8)[margin:-margin, margin:-margin], labels))
    return found


@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("val", "t10k")])
def test_a_picture_is_two_garments_and_says_which(root: Path, split: str, part: str) -> None:
    images, labels = garments(part)
    data = opened(root, tasks=tuple(TASKS))
    assert data.size == (40, 40) and list(data.tasks) == list(TASKS) and data.vocabulary is None
    seen = []
    for picture, of_tasks in pictures(getattr(data, split)):
        # the middle pixels of both lie where the other one may be: find the pair by trying all
        canvases = np.zeros((len(images), len(images), 36, 36), np.uint8)
        canvases[:, :, :28, :28] = images[:, None]
        canvases[:, :, 8:, 8:] = np.maximum(canvases[:, :, 8:, 8:], images[None])
        ((first, second),) = np.argwhere((canvases == picture).all((2, 3)))
        seen.append((first, second))
        a, b = labels[first], labels[second]
        assert (of_tasks["top_left"].item(), of_tasks["bottom_right"].item()) == (a, b)
        assert of_tasks["top_left"].dtype == of_tasks["same_kind"].dtype == torch.int64
        assert of_tasks["same_kind"].item() == any(a in kind and b in kind for kind in KINDS.values())
        one, other = np.zeros((2, 36, 36), bool)
        one[:28, :28], other[8:, 8:] = images[first] > 0, images[second] > 0
        assert of_tasks["overlap"].dtype == torch.float32 and of_tasks["overlap"].shape == (1,)
        assert of_tasks["overlap"].item() == pytest.approx((one & other).sum() / (one | other).sum())
    assert sorted(first for first, _ in seen) == sorted(second for _, second in seen) == [*range(len(images))]
    assert all(first != second for first, second in seen)


def test_every_garment_is_of_one_kind() -> None:
    assert sorted(garment for kind in KINDS.values() for garment in kind) == [*range(len(GARMENTS))]


def test_pairs_depend_on_seed_and_split_alone(root: Path) -> None:
    def pairs(data: Data, split: str) -> list[bytes]:
        return [picture.tobytes() for picture, _ in pictures(getattr(data, split))]

    first = pairs(opened(root), "train")
    assert pairs(opened(root), "train") == first and pairs(opened(root, train=7), "train") == first[:7]
    assert pairs(opened(root, seed=1), "train") != first
    data = opened(root)
    assert all(torch.equal(data.train[3, draw][0], data.train[3, None][0]) for draw in range(5))  # nothing is drawn
    assert len(opened(root, train=1000, val=5).train) == 30 and len(opened(root, train=1000, val=5).val) == 5


def test_the_usual_two_tasks_unless_others_are_asked_for(root: Path) -> None:
    assert opened(root).names == ["top_left", "bottom_right"]
    some = opened(root, tasks=("overlap", "top_left"))
    assert some.names == list(some.val[0, None][1]) == ["top_left", "overlap"]


@pytest.mark.parametrize(
    ("size", "times", "margins"), [((36, 36), 1, (0, 0)), ((71, 50), 1, (17, 7)), ((80, 112), 2, (4, 20))]
)
def test_any_size_has_whole_pixels(root: Path, size: tuple[int, int], times: int, margins: tuple[int, int]) -> None:
    small = pictures(opened(root).train)[0][0]
    image, _ = opened(root, size=size).train[0, None]
    assert image.shape == (3, *size)
    large = (colours(image.numpy())[0] * 255).round().astype(np.uint8)
    inside = large[margins[0] : margins[0] + 36 * times, margins[1] : margins[1] + 36 * times]
    assert (inside == small.repeat(times, 0).repeat(times, 1)).all()
    assert large.astype(int).sum() == inside.astype(int).sum()  # black around it


def test_compressed_files_are_read_too(root: Path, tmp_path: Path) -> None:
    want = pictures(opened(root).val)
    for path in list(root.glob("*ubyte")):
        (root / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    for (picture, labels), (again, same) in zip(want, pictures(opened(root).val), strict=True):
        assert (picture == again).all() and labels == same


def test_losses_and_metrics_take_the_labels(root: Path) -> None:
    data = opened(root, tasks=tuple(TASKS))
    labels = {task: torch.stack([data.train[i, None][1][task] for i in range(6)]) for task in TASKS}
    for name, task in data.tasks.items():
        assert not task.is_dense
        if task.classes:
            right = 50 * torch.nn.functional.one_hot(labels[name], task.channels).float()
        else:
            right = labels[name].clone()
        right.requires_grad_()
        meter = task.meter()
        meter.update(right.detach(), labels[name])
        assert task.loss(right, labels[name]).item() == pytest.approx(0, abs=1e-6), name
        assert meter.compute() == pytest.approx(0 if task.lower_is_better else 100), name
        assert task.loss(-right, labels[name]) > 0.1, name


# ---- files


def test_missing_files_are_named(root: Path) -> None:
    (root / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=f"{root}/t10k-labels-idx1-ubyte is missing, and so is t10k-labels.*gz"):
        opened(root)


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], "is damaged: it has 23535 bytes, and 30 × 28 × 28 take 23536"),
        ("train-labels-idx1-ubyte", lambda b: b + b"\0", "is damaged: it has 39 bytes, and 30 take 38"),
        ("t10k-images-idx3-ubyte", lambda b: b[:9], "is damaged: it has 9 bytes"),
        ("t10k-labels-idx1-ubyte", lambda b: b"\0\0\x0b\1" + b[4:], "is no idx file of bytes in 1 .*00000b01"),
        ("t10k-labels-idx1-ubyte", lambda b: b"", "is no idx file of bytes in 1 dimensions: it begins with nothing"),
        ("t10k-images-idx3-ubyte", lambda b: b"PK\3\4", "is no idx file of bytes in 3 dimensions.*504b0304"),
        (
            "train-labels-idx1-ubyte",
            lambda b: b[:-2] + b"\x0b\x0a",
            "holds 2 labels above 9: the first is 11, of image 28",
        ),
        ("train-labels-idx1-ubyte", lambda b: idx(np.zeros(29, np.uint8)), "holds 30 images, and .* 29 labels"),
        ("train-images-idx3-ubyte", lambda b: idx(np.zeros((30, 32, 32), np.uint8)), "holds images of 32 × 32 pixels"),
    ],
)
def test_damaged_files_are_named(root: Path, file: str, damage, says: str) -> None:
    path = root / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=says) as raised:
        opened(root)
    assert str(path) in str(raised.value)


def test_empty_files_are_named(root: Path) -> None:
    (root / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
    (root / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(0, np.uint8)))
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte holds no image"):
        opened(root)


def test_a_damaged_compressed_file_is_named(root: Path) -> None:
    path = root / "train-images-idx3-ubyte"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    for damaged in (packed[:-9], b"\0" * 50, packed[:30] + b"\xff" * 40 + packed[70:]):
        (root / f"{path.name}.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
            opened(root)


# ---- options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ("brand",)}, "tasks must be among top_left, .*, got 'brand'"),
        ({"size": (40, 35)}, r"size must be \(height, width\), each at least 36 pixels, got \(40, 35\)"),
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"tokenizer": "bert"}, "tokenizer means nothing to the data set 'fashion'"),
    ],
)
def test_bad_options_name_the_culprit(root: Path, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        opened(root, **options)


def test_a_root_is_needed() -> None:
    with pytest.raises(ValueError, match="'fashion' needs its root"):
        open_data("fashion", Options())
