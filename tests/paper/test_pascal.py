"""PASCAL-Context: parts of persons from both kinds of MATLAB files, edges, and what is refused by name."""

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from benchmarks.paper.data import DataError, Options, open_data, pascal, trees
from benchmarks.paper.data.matlab import read_mat

SIZE = (8, 8)
WRITERS = {"5": trees.write_parts_5, "7.3": trees.write_parts_7_3}
FOLDERS = ("JPEGImages", "semseg/VOC12", "semseg/pascal-context", "human_parts", "sal_distill", "normals_distill")


def masks(*boxes, shape=(6, 8)):
    """Rows a … b - 1 and columns c … d - 1 of every (a, b, c, d)."""
    for a, b, c, d in boxes:
        mask = np.zeros(shape, bool)
        mask[a:b, c:d] = True
        yield mask


def person(*parts):
    (everything,) = masks((0, 6, 0, 8))
    return {
        "class": "person",
        "class_ind": 15,
        "mask": everything,
        "parts": [{"part_name": name, "mask": mask} for name, mask in parts],
    }


def thing(index=9, parts=()):
    return person(*parts) | {"class": "thing", "class_ind": index}


@pytest.fixture
def root(tmp_path):
    """One image of 6 × 8 for either split, "1" and "2"."""
    root = tmp_path / "pascal"
    for folder in (*FOLDERS, "pascal-context/trainval", "ImageSets/Context"):
        (root / folder).mkdir(parents=True)
    for id in ("1", "2"):
        Image.new("RGB", (8, 6), (10, 20, 30)).save(root / "JPEGImages" / f"{id}.jpg")
        Image.fromarray(np.array([[0, 1, 20, 255, 15, 15, 0, 0]] * 6, np.uint8)).save(root / f"semseg/VOC12/{id}.png")
        Image.fromarray(np.array([[0, 127, 128, 255, 0, 0, 1, 254]] * 6, np.uint8)).save(root / f"sal_distill/{id}.png")
        Image.fromarray(np.full((6, 8, 3), (128, 128, 0), np.uint8)).save(root / f"normals_distill/{id}.png")
        label_map = np.array([[7] * 4 + [300] * 4] * 6, np.uint16)
        scipy.io.savemat(root / f"pascal-context/trainval/{id}.mat", {"LabelMap": label_map})
        trees.write_parts_5(root / f"human_parts/{id}.mat", id, [thing()])
    (root / "ImageSets/Context/train.txt").write_text("1\n")
    (root / "ImageSets/Context/val.txt").write_text("2\n")
    return root


def opened(root, **options):
    return open_data("pascal", Options(root=root, **{"size": SIZE} | options))


def label(root, task):
    """The only image's label, without the row of padding above and below."""
    return opened(root).val[0, None][1][task][..., 1:7, :]


def test_values(root):
    assert list(opened(root).tasks) == ["semseg", "parts", "saliency", "normals", "edge"]
    assert label(root, "semseg")[0].tolist() == [0, 1, 20, 255, 15, 15, 0, 0]
    assert label(root, "saliency")[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 1]
    assert torch.allclose(label(root, "normals")[:, 2, 3], torch.tensor([0.004, 0.004, -1]), atol=1e-4)
    assert (label(root, "parts") == 255).all()  # nobody is here
    image, labels = opened(root).val[0, None]
    assert labels["semseg"][0].unique().item() == labels["edge"][0, 0].unique().item() == 255
    assert (labels["normals"][:, 0] == 0).all() and (image[:, 0] == 0).all()


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("others", [(), (thing(),), (thing(3, [("head", next(masks((0, 6, 0, 8))))]), thing())])
def test_parts_of_persons(root, version, others):
    """Left and right are one, later parts cover earlier ones, and other things have no part in it."""
    names = ("lebrow", "neck", "luarm", "rhand", "ruleg", "lfoot")
    columns = masks(*((1, 5, at, at + 1) for at in range(6)))
    (over,) = masks((4, 5, 0, 2))
    someone = person(*zip(names, columns, strict=True), ("rlleg", over))
    WRITERS[version](root / "human_parts/2.mat", "2", [*others, someone])
    parts = label(root, "parts")
    assert parts[1].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert parts[4].tolist() == [6, 6, 3, 4, 5, 6, 0, 0]
    assert (parts[[0, 5]] == 0).all()


@pytest.mark.parametrize("version", WRITERS)
def test_one_part_of_each_of_two_persons(root, version):
    left, right = masks((0, 6, 0, 2), (0, 6, 6, 8))
    WRITERS[version](root / "human_parts/2.mat", "2", [person(("hair", left)), person(("torso", right)), person()])
    assert label(root, "parts")[3].tolist() == [1, 1, 0, 0, 0, 0, 2, 2]


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("objects", [[], [person()], [thing(), thing()]])
def test_nobody_with_parts_is_ignored(root, version, objects):
    WRITERS[version](root / "human_parts/2.mat", "2", objects)
    assert (opened(root).val[0, None][1]["parts"] == 255).all()


def test_all_parts_have_a_class():
    sided = {
        side + part for side in "lr" for part in ("ear", "eye", "ebrow", "uarm", "larm", "hand", "uleg", "lleg", "foot")
    }
    assert pascal._PART_OF.keys() == sided | {"head", "hair", "nose", "mouth", "neck", "torso"}
    assert set(pascal._PART_OF.values()) == set(range(1, 7)) and len(pascal.PART_NAMES) == 7 and len(pascal.NAMES) == 21


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([person(("tail", next(masks((0, 6, 0, 8)))))], "a person's part 'tail', expected one of head, hair"),
        ([person(("head", np.ones((6, 7, 2), bool)))], "the mask of head is no array of numbers with two dimensions"),
        (
            [{"class": "person", "mask": np.ones((6, 8), bool)}],
            "no struct anno.objects with the fields class_ind, ",
        ),
        ([thing("many")], "no number in anno.objects.class_ind"),
    ],
)
def test_parts_that_are_none(root, version, objects, message):
    WRITERS[version](root / "human_parts/2.mat", "2", objects)
    with pytest.raises(DataError, match=rf"human_parts/2\.mat.* {message}"):
        opened(root).val[0, None]


@pytest.mark.parametrize("version", WRITERS)
def test_a_mask_of_another_size(root, version):
    WRITERS[version](root / "human_parts/2.mat", "2", [person(("head", np.ones((6, 7), bool)))])
    with pytest.raises(DataError, match=r"human_parts/2\.mat is 6 × 7, but its image .*JPEGImages/2\.jpg is 6 × 8"):
        opened(root).val[0, None]


def test_no_struct_and_no_variable(root):
    scipy.io.savemat(root / "human_parts/2.mat", {"other": 1, "third": 2})
    with pytest.raises(DataError, match=r"human_parts/2\.mat has no variable anno, it holds other, third"):
        opened(root).val[0, None]
    scipy.io.savemat(root / "human_parts/2.mat", {"anno": np.eye(3)})
    with pytest.raises(DataError, match=r"human_parts/2\.mat holds no struct anno with the fields objects"):
        opened(root).val[0, None]
    with h5py.File(root / "human_parts/2.mat", "w") as file:
        file["else"] = 1
    with pytest.raises(DataError, match=r"human_parts/2\.mat has no variable anno, it holds else"):
        opened(root).val[0, None]
    (root / "human_parts/2.mat").write_text("no MATLAB file")
    with pytest.raises(DataError, match=r"human_parts/2\.mat cannot be read as a MATLAB file"):
        opened(root).val[0, None]


def test_matlab_values(tmp_path):
    """Shapes and texts of both versions; an array of HDF5 is the other way round."""
    array = np.arange(6).reshape(2, 3)
    scipy.io.savemat(tmp_path / "5.mat", {"a": array, "text": "two words", "cell": np.array(["x", array], object)})
    with h5py.File(tmp_path / "73.mat", "w") as file:
        file["a"] = array.T
        file["text"] = np.array([[ord(letter)] for letter in "two words"], np.uint16)
        file["text"].attrs["MATLAB_class"] = np.bytes_("char")
        file["#refs#/x"] = np.array([[ord("x")]], np.uint16)
        file["#refs#/x"].attrs["MATLAB_class"] = np.bytes_("char")
        cell = np.array([[file["#refs#/x"].ref], [file["a"].ref]], h5py.ref_dtype)
        file.create_dataset("cell", data=cell, dtype=h5py.ref_dtype).attrs["MATLAB_class"] = np.bytes_("cell")
    for name in ("5.mat", "73.mat"):
        np.testing.assert_array_equal(read_mat(tmp_path / name, "a"), array)
        assert read_mat(tmp_path / name, "text") == "two words"
        text, held = read_mat(tmp_path / name, "cell")
        assert text == "x" and np.array_equal(held, array)


def test_edges_by_hand():
    """Both sides of a border are where the Laplacian is not zero, and thinning leaves one of them."""
    label_map = np.full((9, 10), 7, np.uint16)
    label_map[:, 5:] = 300
    edges = pascal.edges_of(label_map)
    assert edges.shape == (9, 10, 1) and edges.dtype == np.float32
    assert (edges[1:-1, :, 0].sum(1) == 1).all()  # thinning may take the end of a line
    assert set(np.nonzero(edges)[1].tolist()) <= {4, 5}
    assert not pascal.edges_of(np.full((5, 6), 3, np.uint8)).any()
    # a step of one class up on the left and one up on the right cancels in the middle: the Laplacian is 0 there
    ramp = np.tile(np.array([1, 1, 1, 2, 3, 3, 3], np.uint8), (7, 1))
    assert set(np.nonzero(pascal.edges_of(ramp))[1].tolist()) <= {2, 4}


def test_a_label_map_of_another_shape(root):
    scipy.io.savemat(root / "pascal-context/trainval/2.mat", {"LabelMap": np.ones((6, 9), np.uint16)})
    with pytest.raises(DataError, match=r"trainval/2\.mat is 6 × 9, but its image .*JPEGImages/2\.jpg is 6 × 8"):
        opened(root).val[0, None]
    scipy.io.savemat(root / "pascal-context/trainval/2.mat", {"LabelMap": np.ones((6, 8, 2), np.uint16)})
    with pytest.raises(DataError, match=r"trainval/2\.mat: LabelMap is no array of numbers with two dimensions"):
        opened(root).val[0, None]


def test_classes_come_from_either_folder(root):
    first = root / "semseg/VOC12/2.png"
    other = Image.fromarray(np.full((6, 8), 3, np.uint8))
    other.save(root / "semseg/pascal-context/2.png")
    assert label(root, "semseg")[0, 0] == 0  # the first is there
    first.unlink()
    assert (label(root, "semseg") == 3).all()
    (root / "semseg/pascal-context/2.png").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of the 12 files .* semseg/VOC12/2\.png"):
        opened(root)


@pytest.mark.parametrize("value", [21, 254])
def test_labels_out_of_range(root, value):
    Image.fromarray(np.full((6, 8), value, np.uint8)).save(root / "semseg/VOC12/2.png")
    with pytest.raises(DataError, match=rf"VOC12/2\.png holds the labels {value} \(48 pixels\), expected 0 … 20, or"):
        opened(root).val[0, None]


def test_its_own_size_holds_the_largest_of_its_images(root):
    data = open_data("pascal", Options(root=root))
    assert data.size == (512, 512) and data.val[0, None][1]["parts"].shape == (512, 512)


def test_grey_photographs_have_three_channels(root):
    Image.new("L", (8, 6), 100).save(root / "JPEGImages/2.jpg")
    image, _ = opened(root).val[0, None]
    assert image.shape == (3, 8, 8) and image[:, 1:7].unique().numel() == 3


def test_trees_have_all_that_the_layout_allows(tmp_path):
    trees.write_tree("pascal", tmp_path, 4)
    data = open_data("pascal", Options(root=tmp_path, size=trees.SIZE))
    labels = [data.train[index, None][1] for index in range(4)]
    assert [bool((item["parts"] != 255).any()) for item in labels] == [True, True, False, True]
    assert {*labels[0]["parts"].unique().tolist(), *labels[1]["parts"].unique().tolist()} >= set(range(7))
    for item in labels:
        assert torch.equal(
            (item["parts"] != 0) & (item["parts"] != 255), (item["saliency"] == 1) & (item["parts"] != 255)
        )
        assert (item["edge"] == 1).any() and (item["semseg"] == 255).any()
    assert {path.parent.name for path in (tmp_path / "semseg").rglob("*.png")} == {"VOC12", "pascal-context"}
    kinds = {h5py.is_hdf5(path) for path in (tmp_path / "human_parts").iterdir()}
    assert kinds == {True, False}
    assert len({Image.open(path).width for path in (tmp_path / "JPEGImages").iterdir()}) == 3
