"""Taskonomy: scalings by hand, what is unknown, pairs of files, its table of splits, and what is refused by name."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.paper.data import DataError, Options, open_data, taskonomy
from benchmarks.paper.data.taskonomy import STORED

SIZE = (4, 6)
FULL = 2**16
FLAT = {  # the same everywhere: stored, and what it becomes
    "DE": (1023, math.log(1024) / math.log(FULL)),
    "DZ": (0, 0),
    "EO": (4096, 10),
    "ET": (0.02 * FULL, -0.5),
    "Key2D": (60000, 1),
    "Key3D": (0.75 * FULL, 0.5),
    "N": ((255, 0, 51), (1, -1, -0.6)),
    "PC": ((155, 99, 7), (31.428 / 31.922, -21.1 / 21.658)),
    "R": ((255, 102, 0), (1, -0.2, -1)),
    "S2D": (204, 0.6),
    "S25D": (0, -1),
}


def path(root, folder, building, view, domain=None):
    return root / folder / "taskonomy" / building / f"{view}_domain_{domain or folder}.png"


def save(file, stored, what, shape=(8, 12)):
    kind = np.uint16 if what == "grey 16" else np.uint8
    pixels = np.asarray(stored, float).round().astype(kind)
    if pixels.ndim < 2:
        pixels = np.broadcast_to(pixels, (*shape, *pixels.shape))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(file)


def write_view(root, building, view):
    save(path(root, "rgb", building, view), (255, 0, 51), "rgb")
    for task, (stored, _) in FLAT.items():
        save(path(root, STORED[task].folder, building, view), stored, STORED[task].what)


@pytest.fixture
def root(tmp_path):
    """Two buildings to train on, of two views and one, one to validate on, and one for tests that has no files."""
    root = tmp_path / "root"
    for building, view in (("b", "point_1_view_0"), ("b", "point_0_view_3"), ("a", "p"), ("c", "p")):
        write_view(root, building, view)
    table(root, "id,train,val,test\nb,1,0,0\na,1,0,0\nc,0,1,0\nd,0,0,1\n")
    return root


def table(root, text):
    (root / taskonomy.SPLITS).parent.mkdir(exist_ok=True)
    (root / taskonomy.SPLITS).write_bytes(text.encode())


def opened(root, **options):
    return open_data("taskonomy", Options(root=root, **{"size": SIZE} | options))


def test_scalings_by_hand(root):
    image, labels = opened(root).val[0, None]
    assert torch.allclose(image, torch.tensor([1, -1, -0.6]).view(3, 1, 1).expand(3, *SIZE), atol=1e-6)
    assert list(labels) == ["DE", "DZ", "EO", "ET", "Key2D", "Key3D", "N", "PC", "R", "S2D", "S25D"]
    for task, (_, value) in FLAT.items():
        expected = torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1).expand(-1, *SIZE)
        assert labels[task].dtype == torch.float32 and labels[task].shape[0] == taskonomy.TASKS[task].channels
        assert torch.allclose(labels[task], expected, atol=2e-4), task


def test_half_the_size_is_the_mean_of_four(root):
    stored = np.random.default_rng(0).integers(0, 255, (8, 12))
    save(path(root, "segment_unsup2d", "c", "p"), stored, "grey")
    save(path(root, "rgb", "c", "p"), np.stack([stored, stored, stored], 2), "rgb")
    image, labels = opened(root).val[0, None]
    mean = stored.reshape(4, 2, 6, 2).mean((1, 3))
    np.testing.assert_allclose(labels["S2D"][0], mean * 2 / 255 - 1, atol=1e-6)
    np.testing.assert_allclose(image[1], mean * 2 / 255 - 1, atol=1e-6)
    same = opened(root, size=(8, 12)).val[0, None][1]["S2D"]
    np.testing.assert_allclose(same[0], stored * 2 / 255 - 1, atol=1e-6)


def test_what_is_unknown_is_not_mixed_in(root):
    depth = np.full((8, 12), 512.0)
    depth[2, 4] = 65535
    save(path(root, "depth_zbuffer", "c", "p"), depth, "grey 16")
    normals = np.full((8, 12, 3), (128, 0, 128))
    normals[7, 11] = 127, 128, 127
    save(path(root, "normal", "c", "p"), normals, "vector")
    save(path(root, "keypoints3d", "c", "p"), np.where(depth == 65535, 65535, 0), "grey 16")
    labels = opened(root).val[0, None][1]
    unknown = torch.zeros(SIZE, dtype=torch.bool)
    unknown[1, 2] = True
    assert torch.equal(labels["DZ"][0].isnan(), unknown)
    assert torch.allclose(labels["DZ"][0][~unknown], torch.tensor(math.log(513) / math.log(FULL)))
    assert labels["Key3D"].isfinite().all()  # 65535 is a value of all others
    unknown = torch.zeros(SIZE, dtype=torch.bool)
    unknown[3, 5] = True
    assert all(torch.equal(channel.isnan(), unknown) for channel in labels["N"])
    for task in ("DZ", "N"):
        prediction = torch.zeros(labels[task][None].shape).requires_grad_()
        loss = taskonomy.TASKS[task].loss(prediction + 0.5, labels[task][None])
        loss.backward()
        assert loss.isfinite() and prediction.grad.isfinite().all()


def test_half_of_the_draws_are_mirrored(root):
    ramp = np.tile(np.arange(12) * 20, (8, 1))
    save(path(root, "rgb", "b", "point_1_view_0"), np.stack([ramp] * 3, 2), "rgb")
    save(path(root, "segment_unsup25d", "b", "point_1_view_0"), ramp, "grey")
    save(path(root, "normal", "b", "point_1_view_0"), np.stack([ramp, ramp, 0 * ramp], 2), "vector")
    train = opened(root).train
    image, plain = train[1, None]
    mirrored = 0
    for draw in range(60):
        drawn, labels = train[1, draw]
        is_mirrored = not torch.equal(drawn, image)
        mirrored += is_mirrored
        for task, label in labels.items():
            expected = plain[task].flip(2) if is_mirrored else plain[task]
            sign = torch.ones(len(label), 1, 1)
            if task == "N" and is_mirrored:
                sign[0] = -1
            assert torch.equal(label, expected * sign), task
        assert torch.equal(drawn, image.flip(2) if is_mirrored else image)
    assert 18 <= mirrored <= 42


def test_order_is_that_of_the_table_and_of_names(root):
    train = opened(root).train
    assert [tuple(view) for view in train.views] == [("b", "point_0_view_3"), ("b", "point_1_view_0"), ("a", "p")]
    assert [tuple(view) for view in opened(root, train=2).train.views] == [tuple(view) for view in train.views][:2]


def test_pictures_belong_together_by_what_comes_before_their_domain(root):
    for file in (root / "keypoints2d/taskonomy/b").iterdir():
        file.rename(file.with_name(file.name.replace("_domain_keypoints2d", "_domain_keypoint2d")))
    assert len(opened(root).train) == 3 and opened(root).train[0, None][1]["Key2D"].isfinite().all()
    path(root, "keypoints2d", "b", "point_0_view_3", "keypoint2d").rename(
        path(root, "keypoints2d", "b", "point_0_view_3")
    )
    with pytest.raises(
        DataError, match=r"keypoints2d/taskonomy/b holds files that end in _domain_keypoint2d\.png, _domain"
    ):
        opened(root)


def test_a_picture_without_a_domain(root):
    (root / "normal/taskonomy/a/p.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"normal/taskonomy/a holds p\.png, expected VIEW_domain_NAME\.png"):
        opened(root)


def test_all_missing_pictures_are_named(root):
    for folder, building, view in (
        ("normal", "b", "point_0_view_3"),
        ("rgb", "a", "p"),
        ("reshading", "c", "p"),
        ("keypoints2d", "b", "point_1_view_0"),
    ):
        path(root, folder, building, view).unlink()
    with pytest.raises(DataError) as caught:
        opened(root)
    message = str(caught.value)
    assert "lacks 4 of the 48 files" in message
    for name in ("normal/taskonomy/b/point_0_view_3_domain_normal.png", "rgb/taskonomy/a/p_domain_rgb.png"):
        assert name in message
    assert "keypoints2d/taskonomy/b/point_1_view_0_domain_" in message and "reshading/taskonomy/c/p_domain_" in message
    assert len(opened(root, train=1, val=1, tasks=("DE", "EO")).train) == 1


def test_a_building_without_pictures(root):
    table(root, "id,train,val,test\nb,1,0,0\nd,1,0,0\nc,0,1,0\n")
    with pytest.raises(DataError, match=r"lacks 1 of the .* rgb/taskonomy/d/\*\.png"):
        opened(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with a name and train, val, test, got nothing"),
        ("b,1,0,0\n", "must begin with a name and train, val, test, got b, 1, 0, 0"),
        ("id,train,val,test\n", "names no building: the split is empty"),
        ("id,train,val,test\nb,1,0,0\nb,0,1,0\n", "names b more than once"),
        ("id,train,val,test\n../b,1,0,0\nc,0,1,0\n", r"must hold names without a path, got '\.\./b'"),
        ("id,train,val,test\nb,1,1,0\n", "must put b into one split by a 1, 0 in the others, got 1, 1, 0"),
        ("id,train,val,test\nb,yes,0,0\n", "must put b into one split .* got yes, 0, 0"),
        ("id,train,val,test\nb,1\n", "must put b into one split .* got 1, nothing, nothing"),
        ("id,train,val,test\nb,1,0,0\nc,0,0,1\n", "puts no building into val: the split is empty"),
        ("id,train,val,test\nb,0,0,0\nc,0,1,0\n", "puts no building into train: the split is empty"),
    ],
)
def test_tables_that_are_none(root, text, message):
    table(root, text)
    with pytest.raises(DataError, match=r"train_val_test_tiny\.csv " + message):
        opened(root)


@pytest.mark.parametrize(
    "text", ["id,train,val,test\r\nb,1,0,0\r\nc,0,1,0\r\n", "\ufeffscene, Test,train ,val\n\nb,0,1,0\nc,0,0,1"]
)
def test_ends_of_lines_and_order_of_columns(root, text):
    table(root, text)
    assert len(opened(root).train) == 2 and len(opened(root).val) == 1


@pytest.mark.parametrize(
    ("task", "mode", "message"),
    [
        ("DE", "L", "stores L pixels, expected I;16"),
        ("Key2D", "RGB", "stores RGB pixels, expected I;16"),
        ("N", "L", "stores L pixels, expected RGB"),
        ("PC", "I;16", "stores I;16 pixels, expected RGB"),
        ("S2D", "RGB", "stores RGB pixels, expected L"),
        ("R", "I;16", "stores I;16 pixels, expected RGB"),
    ],
)
def test_pixels_of_another_kind(root, task, mode, message):
    file = path(root, STORED[task].folder, "c", "p")
    Image.new(mode, (12, 8)).save(file)
    with pytest.raises(DataError, match=f"{file.name} {message}"):
        opened(root).val[0, None]


def test_a_picture_of_another_size(root):
    save(path(root, "reshading", "c", "p"), (1, 2, 3), "rgb", (8, 13))
    with pytest.raises(DataError, match=r"p_domain_reshading\.png is 8 × 13, but its image .*_rgb\.png is 8 × 12"):
        opened(root).val[0, None]


def test_a_size_of_another_shape(root):
    with pytest.raises(DataError, match=r"_domain_rgb\.png is 8 × 12: it cannot be scaled to size 4 × 4 without"):
        opened(root, size=(4, 4))
    with pytest.raises(DataError, match="choose a size of the same shape"):
        opened(root, size=None)
    assert taskonomy.SIZE == (256, 256)


def test_no_folder_of_a_task(root):
    (root / "normal").rename(root / "normals")
    with pytest.raises(DataError, match=r"not laid out as Taskonomy: it lacks normal/taskonomy/ of rgb/.*normals/"):
        opened(root)
    assert list(opened(root, tasks=("R", "DE")).tasks) == ["DE", "R"]
