"""NYUD-v2: what its files mean, value by value, and what is refused by name."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.paper.data import DataError, Options, nyud, open_data, trees
from benchmarks.paper.data.files import check_classes, read_split

SIZE = (8, 8)


@pytest.fixture
def root(tmp_path):
    """One image of 4 × 6 for either split, written value by value; padded by 2 rows above and 1 column to the left."""
    files = {
        name: tmp_path / "nyud" / name for name in ("images", "segmentation", "depth", "normals", "edge", "gt_sets")
    }
    for folder in files.values():
        folder.mkdir(parents=True)
    for id in ("1", "2"):
        Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3)).save(files["images"] / f"{id}.png")
        Image.fromarray(np.array([[0, 1, 2, 40, 40, 5]] * 4, np.uint8)).save(files["segmentation"] / f"{id}.png")
        np.save(files["depth"] / f"{id}.npy", np.array([[0, 0.5, 1, 2, 3, 10]] * 4, np.float32))
        normals = np.array(
            [[[255, 128, 128], [0, 127, 127], [128, 127, 128], [127, 127, 127], [128, 128, 255], [3, 4, 5]]]
        )
        Image.fromarray(normals.repeat(4, 0).astype(np.uint8)).save(files["normals"] / f"{id}.png")
        Image.fromarray(np.array([[0, 255, 51, 127, 128, 0]] * 4, np.uint8)).save(files["edge"] / f"{id}.png")
    (files["gt_sets"] / "train.txt").write_text("1\n")
    (files["gt_sets"] / "val.txt").write_text("2\n")
    return tmp_path / "nyud"


def opened(root, **options):
    return open_data("nyud", Options(root=root, **{"size": SIZE} | options))


def row(label):
    """The known columns of a row of the image."""
    return label[..., 3, 1:7].tolist()


def test_values(root):
    data = opened(root)
    assert list(data.tasks) == ["semseg", "depth", "normals", "edge"]
    image, labels = data.val[0, None]
    assert row(labels["semseg"]) == [255, 0, 1, 39, 39, 4]
    assert row(labels["depth"][0]) == [0, 0.5, 1, 2, 3, 10]
    expected = [[1, 0.004, 0.004], [-1, -0.004, -0.004], [0, 0, 0], [0, 0, 0], [0.004, 0.004, 1]]
    assert torch.allclose(labels["normals"][:, 3, 1:6].T, torch.tensor(expected), atol=1e-4)
    assert (labels["normals"][:, 3, 3:5] == 0).all()  # exactly, so that no loss and no metric counts it
    assert row(labels["edge"][0]) == [0, 1, 0, 0, 1, 0]
    outside = torch.ones(SIZE, dtype=torch.bool)
    outside[2:6, 1:7] = False
    for task, fill in (("semseg", 255), ("depth", 0), ("normals", 0), ("edge", 255)):
        assert (labels[task][..., outside] == fill).all()
    assert (image[:, outside] == 0).all()
    red = (torch.arange(72).view(4, 6, 3)[..., 0] / 255 - 0.485) / 0.229
    assert torch.allclose(image[0, 2:6, 1:7], red)


def test_its_own_size_holds_its_images(root):
    data = open_data("nyud", Options(root=root))
    assert data.size == (448, 576) and data.val[0, None][0].shape == (3, 448, 576)


def test_a_size_that_an_image_does_not_fit_in(root):
    with pytest.raises(DataError, match=r"1\.png is 4 × 6, larger than size 8 × 4: an evaluation looks at whole"):
        opened(root, size=(8, 4))
    Image.new("RGB", (600, 425)).save(root / "images" / "2.png")  # found when it is read, where no size was given
    with pytest.raises(DataError, match=r"2\.png is 425 × 600, larger than size 448 × 576"):
        open_data("nyud", Options(root=root)).val[0, None]


def test_labels_out_of_range(root):
    labels = np.array([[0, 41, 41, 40, 200, 5]] * 4, np.uint8)
    Image.fromarray(labels).save(root / "segmentation" / "1.png")
    with pytest.raises(DataError, match=r"segmentation/1\.png holds the labels 41 \(8 pixels\), 200 \(4 pixels\), "):
        opened(root).train[0, None]
    path = root / "segmentation" / "1.png"
    with pytest.raises(DataError, match=r"holds the labels -1 \(1 pixels\), expected 0 … 2, or 255"):
        check_classes(path, np.array([-1, 0, 255]), 3, 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1, 2, np.nan, 0, 0, 0]] * 4), r"a depth of nan \(4 such pixels\)"),
        (np.array([[1, 2, -3, 0, 0, 0]] * 4, np.float32), r"a depth of -3\.0 \(4 such pixels\)"),
        (np.array([[1, 2, np.inf, 0, 0, 0]] * 4), r"a depth of inf"),
        (np.ones((1, 4, 6), np.float32), r"shape \(1, 4, 6\), expected \(height, width\)"),
        (np.ones((4, 6), np.uint16), r"uint16, expected metres as floating-point numbers"),
        (np.ones((4, 6), complex), r"complex128, expected an array of real numbers"),
        (np.ones((6, 4), np.float32), r"is 6 × 4, but its image .*images/1\.png is 4 × 6"),
    ],
)
def test_depth_that_is_none(root, array, message):
    np.save(root / "depth" / "1.npy", array)
    with pytest.raises(DataError, match=r"depth/1\.npy .*" + message):
        opened(root).train[0, None]


class Harm:
    """What a pickle can do when it is loaded."""

    done = False

    def __reduce__(self):
        return (setattr, (Harm, "done", True))


def test_depth_is_never_unpickled(root):
    np.save(root / "depth" / "1.npy", np.array([[Harm()]], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"depth/1\.npy cannot be read as a NumPy array: .*allow_pickle"):
        opened(root).train[0, None]
    assert not Harm.done
    np.load(root / "depth" / "1.npy", allow_pickle=True)
    assert Harm.done  # the file would have done it


def test_depth_in_an_archive(root):
    with (root / "depth" / "1.npy").open("wb") as file:
        np.savez(file, np.ones((4, 6)))
    with pytest.raises(DataError, match=r"depth/1\.npy holds NpzFile"):
        opened(root).train[0, None]


@pytest.mark.parametrize(
    ("folder", "mode", "message"),
    [
        ("segmentation", "RGB", "stores RGB pixels, expected L or P"),
        ("segmentation", "I;16", "stores I;16 pixels, expected L or P"),
        ("normals", "L", "stores L pixels, expected RGB or RGBA"),
        ("edge", "RGB", "stores RGB pixels, expected L or 1"),
        ("images", "I;16", "stores I;16 pixels, expected RGB"),
    ],
)
def test_pixels_of_another_kind(root, folder, mode, message):
    Image.new(mode, (6, 4)).save(root / folder / "1.png")
    with pytest.raises(DataError, match=rf"{folder}/1\.png {message}"):
        opened(root).train[0, None]


@pytest.mark.parametrize("folder", ["segmentation", "normals", "edge"])
def test_a_label_of_another_size(root, folder):
    path = root / folder / "1.png"
    Image.open(path).resize((6, 5)).save(path)
    with pytest.raises(DataError, match=rf"{folder}/1\.png is 5 × 6, but its image .*images/1\.png is 4 × 6"):
        opened(root).train[0, 0]


def test_labels_of_a_palette_are_its_indices(root):
    picture = Image.open(root / "segmentation" / "2.png")
    expected = opened(root).val[0, None][1]["semseg"]
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    assert picture.mode == "P"
    picture.save(root / "segmentation" / "2.png")
    assert torch.equal(opened(root).val[0, None][1]["semseg"], expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no image: the split is empty"),
        ("\n \n\r\n", "names no image: the split is empty"),
        ("1\n1\n", "names 1 more than once"),
        ("../1\n", r"must hold names without a path, got '\.\./1'"),
        ("a/1\n1\n", "must hold names without a path, got 'a/1'"),
        ("/etc/passwd", "must hold names without a path"),
        ("..", "must hold names without a path"),
        ("a\\1", "must hold names without a path"),
    ],
)
def test_splits_that_are_none(root, text, message):
    (root / "gt_sets" / "train.txt").write_bytes(text.encode())
    with pytest.raises(DataError, match=r"gt_sets/train\.txt " + message):
        opened(root)


def test_an_image_in_both_splits(root):
    (root / "gt_sets" / "val.txt").write_text("2\n1\n")
    with pytest.raises(DataError, match=r"gt_sets/val\.txt names 1, which gt_sets/train\.txt names too"):
        opened(root)
    assert len(opened(root, val=1).val) == 1


def test_a_split_that_is_no_text(root):
    (root / "gt_sets" / "val.txt").write_bytes(b"\xff\xfe1\x00")
    with pytest.raises(DataError, match=r"gt_sets/val\.txt cannot be read as text"):
        opened(root)


@pytest.mark.parametrize("text", ["a\r\nb\r\nc\r\n", "a\nb\nc", "\ufeffa\n\nb  \n c\n\n", "a\rb\rc\r"])
def test_ends_of_lines(tmp_path, text):
    path = tmp_path / "train.txt"
    path.write_bytes(text.encode())
    assert read_split(path, None) == ["a", "b", "c"] and read_split(path, 2) == ["a", "b"]


def test_the_first_ten_of_many_that_are_missing(tmp_path):
    trees.write_tree("nyud", tmp_path, 4)
    shutil.rmtree(tmp_path / "edge")
    (tmp_path / "edge").mkdir()
    (tmp_path / "depth" / "val_0001.npy").unlink()
    (tmp_path / "images" / "train_0003.png").unlink()
    (tmp_path / "normals" / "val_0003.png").unlink()
    with pytest.raises(DataError) as caught:
        opened(tmp_path, size=None)
    message = str(caught.value)
    assert "lacks 11 of the 40 files" in message and "(11 in all)" in message
    assert len(re.findall(r"(?:edge|depth|images|normals)/\w+\.(?:png|npy)", message)) == 10
    assert list(opened(tmp_path, size=None, tasks=("semseg",), train=3).tasks) == ["semseg"]  # which needs none of them


def test_what_is_not_trained_need_not_be_there(root):
    shutil.rmtree(root / "depth")
    with pytest.raises(DataError, match=r"not laid out as NYUD-v2: it lacks depth/ of images/, .*, and holds edge/, "):
        opened(root)
    data = opened(root, tasks=("normals", "edge"))
    assert list(data.train[0, 0][1]) == ["normals", "edge"]
    (root / "segmentation" / "2.png").unlink()  # it guides the crops of training alone
    assert len(opened(root, tasks=("edge",)).val) == 1
    (root / "segmentation" / "1.png").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of the 5 files .* segmentation/1\.png"):
        opened(root, tasks=("edge",))


def test_forty_classes_are_named():
    assert len(nyud.NAMES) == len(set(nyud.NAMES)) == 40 == nyud.TASKS["semseg"].channels
