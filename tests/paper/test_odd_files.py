"""Files that can be read, and would give wrong labels without a word: each is refused by its name, or read right."""

import re
import struct
import zlib

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from benchmarks.paper.data import DataError, Options, files, nyud, open_data, pascal, trees
from benchmarks.paper.data.common import check_counts, check_size
from benchmarks.paper.data.matlab import read_mat


@pytest.fixture
def root(request, tmp_path):
    trees.write_tree(request.param, tmp_path, 1)
    return tmp_path


def first(name, root):
    return open_data(name, Options(root=root)).train[0, None]


def png(path, bits, colour, rows):
    """A PNG of any depth: ``rows`` are the bytes of its lines."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width = len(rows[0]) * 8 // bits // (3 if colour == 2 else 1)
    head = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [2, 4])
def test_classes_in_less_than_a_byte_are_not_stretched(tmp_path, bits):
    """Pillow makes 255 of the highest value, so that a class 1 in four bits would be class 17."""
    png(tmp_path / "label.png", bits, 0, [b"\x12\x30"] * 2)
    with pytest.raises(DataError, match=r"label\.png stores grey of less than 8 bits"):
        files.read_picture(tmp_path / "label.png", "classes")
    Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8)).convert("P").save(tmp_path / "palette.png", bits=bits)
    assert files.read_picture(tmp_path / "palette.png", "classes").tolist() == [[0, 1, 2, 3]]


def test_sixteen_bits_of_colour_are_their_higher_byte(tmp_path):
    png(tmp_path / "rgb.png", 16, 2, [bytes((200, 255, 3, 0, 77, 128))])
    for what in ("rgb", "vector"):
        assert files.read_picture(tmp_path / "rgb.png", what).tolist() == [[[200, 3, 77]]]


@pytest.mark.parametrize("root", ["nyud"], indirect=True)
@pytest.mark.parametrize("folder", ["segmentation", "normals", "edge"])
def test_a_label_is_stored_without_loss(root, folder):
    path = root / folder / "train_0000.png"
    Image.open(path).save(path, format="JPEG")
    with pytest.raises(DataError, match=rf"{folder}/train_0000\.png is JPEG, expected PNG"):
        first("nyud", root)


@pytest.mark.parametrize(("root", "folder"), [("nyud", "edge"), ("pascal", "sal_distill")], indirect=["root"])
def test_a_map_of_ones_is_not_one_of_bytes(root, folder, request):
    path = root / folder / "train_0000.png"
    held = np.asarray(Image.open(path))
    Image.fromarray((held > 127).astype(np.uint8)).save(path)
    name = "nyud" if folder == "edge" else "pascal"
    with pytest.raises(DataError, match=rf"{folder}/train_0000\.png holds 0 and 1, expected 0 … 255"):
        first(name, root)
    Image.fromarray(np.zeros_like(held)).save(path)  # nothing at all is an image without edges
    label = first(name, root)[1]["edge" if folder == "edge" else "saliency"]
    assert set(label.unique().tolist()) == {0, 255}


@pytest.mark.parametrize("root", ["nyud"], indirect=True)
@pytest.mark.parametrize("factor", [1000, 1e300])
def test_depth_in_another_unit(root, factor):
    path = root / "depth" / "train_0000.npy"
    np.save(path, np.load(path).astype(np.float64) * factor)
    with pytest.raises(DataError, match=r"train_0000\.npy holds a depth of .* expected 0 … 100 metres"):
        first("nyud", root)


@pytest.mark.parametrize("root", ["nyud"], indirect=True)
@pytest.mark.parametrize("change", [lambda a: a.astype(">f8"), np.asfortranarray, lambda a: a.astype(np.float64)])
def test_depth_in_any_order_and_precision(root, change):
    before = first("nyud", root)[1]["depth"]
    path = root / "depth" / "train_0000.npy"
    np.save(path, change(np.load(path)))
    assert torch.equal(first("nyud", root)[1]["depth"], before)


@pytest.mark.parametrize("root", ["pascal"], indirect=True)
def test_a_label_map_with_nan(root):
    """Every neighbour of a NaN would be an edge."""
    path = root / "pascal-context/trainval/train_0000.mat"
    label_map = scipy.io.loadmat(path)["LabelMap"].astype(float)
    label_map[2, 3] = np.nan
    scipy.io.savemat(path, {"LabelMap": label_map})
    with pytest.raises(DataError, match=r"train_0000\.mat: LabelMap holds 1 numbers that are NaN or infinite"):
        first("pascal", root)


def test_a_thing_of_no_class_is_no_person(tmp_path):
    trees.write_parts_5(
        tmp_path / "parts.mat",
        "parts",
        [{"class": "", "class_ind": float("nan"), "mask": np.ones((2, 2)), "parts": []}],
    )
    anno = read_mat(tmp_path / "parts.mat", "anno")
    assert list(pascal._person_parts(tmp_path, anno)) == []


@pytest.mark.parametrize("root", ["pascal"], indirect=True)
def test_a_photograph_is_seen_as_its_pixels_are_stored(root):
    """Labels know nothing of the turn that a camera notes; and four inks are the same colours."""
    path = root / "JPEGImages/train_0000.jpg"
    before = first("pascal", root)[0]
    picture = Image.open(path).copy()
    exif = picture.getexif()
    exif[274] = 6  # to be shown a quarter turned
    picture.save(path, quality=95, exif=exif)
    assert (first("pascal", root)[0] - before).abs().mean() < 0.05
    picture.convert("CMYK").save(path, quality=95)
    assert (first("pascal", root)[0] - before).abs().mean() < 0.05


def test_a_mark_of_byte_order_is_no_part_of_a_gloss(tmp_path):
    """It would change the first text, and with it the split that it is in."""
    lines = b"".join(b"thing %d\tn\t0%d\t%d\r\n" % (i, i % 10, i) for i in range(60))
    held = []
    for mark in (b"", b"\xef\xbb\xbf"):
        path = tmp_path / f"{len(mark)}.tsv"
        path.write_bytes(mark + lines)
        data = open_data("wordnet", Options(root=path))
        held.append(([gloss.text for gloss in data.train.glosses], [gloss.text for gloss in data.val.glosses]))
    assert held[0] == held[1] and "thing 0" in (*held[0][0], *held[0][1])


@pytest.mark.parametrize("name", ["nyud", "pascal", "taskonomy", "fashion", "wordnet"])
def test_a_root_whose_name_no_file_system_takes(name):
    with pytest.raises(DataError, match=r"^a{300}"):
        open_data(name, Options(root="a" * 300))


def test_a_table_that_csv_gives_up_on(tmp_path):
    (tmp_path / "table.csv").write_text('id,"' + "x" * 200_000)
    with pytest.raises(DataError, match=r"table\.csv cannot be read as a table: field larger"):
        files.read_table(tmp_path / "table.csv")


@pytest.mark.parametrize("size", [(64.5, 64), (64, "64"), 64, (64, 64, 3), (64, 0), (float("nan"), 64)])
def test_sizes_are_whole_numbers(size):
    with pytest.raises(ValueError, match=re.escape(f"each at least 16 pixels, got {size}")):
        check_size(Options(size=size), (64, 64), 16)


def test_counts_are_whole_numbers():
    check_counts(Options(train=np.int64(3)))
    with pytest.raises(ValueError, match=r"val must be at least 1, got 2\.5"):
        check_counts(Options(val=2.5))


@pytest.mark.parametrize("module", [nyud, pascal])
def test_no_image_is_in_both_splits(module, tmp_path):
    name = module.__name__.rpartition(".")[2]
    trees.write_tree(name, tmp_path, 2)
    splits = {"nyud": nyud.Nyud, "pascal": pascal.Pascal}[name].splits
    (tmp_path / splits["val"]).write_text("val_0000\ntrain_0001\n")
    with pytest.raises(DataError, match=r"train_0001, which .* names too"):
        open_data(name, Options(root=tmp_path))
    data = open_data(name, Options(root=tmp_path, train=1))  # what is not used is in no split
    assert not set(data.train.ids) & set(data.val.ids)


def test_what_is_read_of_a_file_belongs_to_the_item(tmp_path):
    """Who changes an item in place changes neither the file nor the next item."""
    trees.write_tree("nyud", tmp_path / "nyud", 1)
    bytes_of = {"images-idx3": (3, (2, 28, 28)), "labels-idx1": (1, (2,))}
    for part in ("train", "t10k"):
        for kind, (dimensions, shape) in bytes_of.items():
            body = np.arange(int(np.prod(shape))) % 10
            head = bytes((0, 0, 8, dimensions)) + np.array(shape, ">u4").tobytes()
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(head + body.astype(np.uint8).tobytes())
    rooms = open_data("rooms", Options(train=1, val=1, size=(16, 16), cache=tmp_path / "cache"))
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for data in (
        rooms,
        open_data("nyud", Options(root=tmp_path / "nyud")),
        open_data("fashion", Options(root=tmp_path)),
    ):
        for draw in (None, 0, 1):
            image, labels = data.train[0, draw]
            before = [image.clone(), *(label.clone() for label in labels.values())]
            for value in (image, *labels.values()):
                value.zero_()
            again, others = data.train[0, draw]
            assert all(map(torch.equal, before, (again, *others.values())))
    assert written == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
