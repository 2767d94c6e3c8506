"""Whole items against a few lines of NumPy that read the same files: image and labels, as training and evaluation see
them. The lines share no code with the loaders; what is random is drawn again, in the order that the modules state."""

import gzip
import math

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.paper.data import Options, open_data, trees

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SIZE = (40, 56)
"""Smaller than the trees' images, so that crops are drawn, and not square."""
FILL = {"semseg": 255, "parts": 255, "saliency": 255, "edge": 255, "depth": 0, "normals": 0}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    base = tmp_path_factory.mktemp("trees")
    for name in ("nyud", "pascal", "taskonomy"):
        trees.write_tree(name, base / name, 3)
    return base


def picture(path):
    return np.array(Image.open(path))


def normals(path):
    stored = picture(path)
    grey = np.isin(stored, (127, 128)).all(2, keepdims=True)
    return np.where(grey, 0, stored / 127.5 - 1)


def nyud_files(root, id):
    return picture(root / f"images/{id}.png"), {
        "semseg": picture(root / f"segmentation/{id}.png").astype(int)[..., None] - 1,
        "depth": np.load(root / f"depth/{id}.npy")[..., None],
        "normals": normals(root / f"normals/{id}.png"),
        "edge": picture(root / f"edge/{id}.png")[..., None] / 255,
    }


def pascal_files(root, id):
    path = root / f"semseg/VOC12/{id}.png"
    path = path if path.exists() else root / f"semseg/pascal-context/{id}.png"
    return picture(root / f"JPEGImages/{id}.jpg"), {
        "semseg": picture(path).astype(int)[..., None],
        "saliency": (picture(root / f"sal_distill/{id}.png")[..., None] > 127.5).astype(int),
        "normals": normals(root / f"normals_distill/{id}.png"),
        "parts": parts(root / f"human_parts/{id}.mat", path)[..., None],
    }


PARTS = {
    **{"head": 1, "hair": 1, "torso": 2, "neck": 2, "luarm": 3, "ruarm": 3},
    **{"lhand": 4, "rlarm": 4, "luleg": 5, "ruleg": 5, "llleg": 6, "rfoot": 6},
}
"""Those that the trees write."""


def parts(path, semseg):
    """Of files of MATLAB's version 5."""
    labels = np.zeros(picture(semseg).shape, int)
    for thing in np.ravel(scipy.io.loadmat(path, squeeze_me=True)["anno"]["objects"].item()):
        if thing["class_ind"] == 15:
            for part in np.ravel(thing["parts"]):
                labels[part["mask"] > 0] = PARTS[str(part["part_name"])]
    return labels


def seen(image, labels, size, draw=None, index=None):
    """What training (with a draw) or evaluation makes of it: {name: (C, *size) float64}, the image not yet coloured,
    and whether its colours are to be changed."""
    labels, coloured = {"image": image, **labels}, False
    height, width = image.shape[:2]
    if draw is not None:
        random = np.random.default_rng((draw, index))
        scale = random.uniform(0.5, 2)
        tall, wide = round(height * scale), round(width * scale)
        rows, columns = min(tall, size[0]), min(wide, size[1])
        crops = 10 if tall > rows or wide > columns else 1
        for _ in range(crops):
            top, left = random.integers(tall - rows + 1), random.integers(wide - columns + 1)
            y, x = (
                (np.arange(top, top + rows) + 0.5) * height / tall,
                (np.arange(left, left + columns) + 0.5) * width / wide,
            )
            window = np.ix_(np.floor(y + 1e-9).astype(int), np.floor(x + 1e-9).astype(int))
            counts = np.unique(labels["semseg"][window][labels["semseg"][window] % 256 != 255], return_counts=True)[1]
            if len(counts) and counts.max() / counts.sum() < 0.75:
                break
        mirror = random.random() < 0.5
        for name, label in labels.items():
            cut = between(label.astype(float), y - 0.5, x - 0.5) if name == "image" else label[window]
            cut = cut / scale if name == "depth" else cut
            cut = cut[:, ::-1] if mirror else cut
            labels[name] = cut * (-1, 1, 1) if mirror and name == "normals" else cut
        coloured = any(random.random() < 0.5 for _ in range(4))
    return {name: framed(label, FILL.get(name), size) for name, label in labels.items()}, coloured


def between(values, y, x):
    """Bilinear, by the four pixels around every point."""
    (height, width), out = values.shape[:2], 0
    y, x = y.clip(0, height - 1)[:, None, None], x.clip(0, width - 1)[None, :, None]
    for i in (0, 1):
        for j in (0, 1):
            row, column = np.floor(y).astype(int) + i, np.floor(x).astype(int) + j
            weight = (1 - abs(y - row)) * (1 - abs(x - column))
            out = out + weight * values[row.clip(max=height - 1)[..., 0], column.clip(max=width - 1)[..., 0]]
    return out


def framed(label, fill, size):
    out = np.full((*size, label.shape[2]), np.nan if fill is None else fill, float)
    top, left = ((want - have) // 2 for want, have in zip(size, label.shape, strict=False))
    out[top : top + label.shape[0], left : left + label.shape[1]] = label
    return out.transpose(2, 0, 1)


def check(item, expected, coloured, names):
    image, labels = item
    for name in names:
        label = labels[name].numpy()
        want = expected[name] if label.ndim == 3 else expected[name][0] % 256  # -1, the void of NYUD-v2, is 255
        if name == "parts" and not ((want > 0) & (want < 255)).any():
            want = np.full_like(want, 255)
        np.testing.assert_allclose(label, want, atol=1e-5, err_msg=name)
    inside = ~np.isnan(expected["image"])
    assert (image.numpy()[~inside] == 0).all()
    got = (image.numpy() * STD[:, None, None] + MEAN[:, None, None]) * 255
    error = np.abs(got - expected["image"])[inside].max()
    assert coloured or error <= 0.5 + 1e-3  # half a step of rounding, where colours were not changed


@pytest.mark.parametrize("name", ["nyud", "pascal"])
def test_every_pixel_of_every_label_is_the_file_s(name, roots):
    files, names = {
        "nyud": (nyud_files, ("semseg", "depth", "normals", "edge")),
        "pascal": (pascal_files, ("semseg", "parts", "saliency", "normals")),
    }[name]
    data = open_data(name, Options(root=roots / name))
    for split in (data.train, data.val):
        for index in (0, 2):  # those whose parts are of MATLAB's version 5
            check(split[index, None], *seen(*files(roots / name, split.ids[index]), data.size), names)
    data.train.size = SIZE
    plain = 0
    for draw in (*range(24), 2**31, 2**70):
        for index in (0, 2):
            expected, coloured = seen(*files(roots / name, data.train.ids[index]), SIZE, draw, index)
            plain += not coloured
            check(data.train[index, draw], expected, coloured, names)
    assert plain > 0


def test_taskonomy_s_pixels_are_the_mean_of_four(roots):
    root = roots / "taskonomy"
    data = open_data("taskonomy", Options(root=root, size=(64, 96)))
    view = data.train.views[1]

    def quarter(folder):
        stored = picture(root / f"{folder}/taskonomy/train/{view.name}_domain_{folder}.png").astype(float)
        unknown = stored == 65535 if folder.startswith("depth") else False
        if folder == "normal":
            unknown = np.isin(stored, (127, 128)).all(2, keepdims=True) & np.ones(3, bool)
        stored = np.where(unknown, np.nan, stored).reshape(128, 192, -1)
        return stored.reshape(64, 2, 96, 2, -1).mean((1, 3)).transpose(2, 0, 1)

    folders = {
        "DE": ("depth_euclidean", lambda v: np.log(1 + v) / math.log(2**16)),
        "DZ": ("depth_zbuffer", lambda v: np.log(1 + v) / math.log(2**16)),
        "EO": ("edge_occlusion", lambda v: v / (0.00625 * 2**16)),
        "ET": ("edge_texture", lambda v: np.clip(v / (0.08 * 2**16), 0, 1) * 2 - 1),
        "Key2D": ("keypoints2d", lambda v: np.clip(v / (0.005 * 2**16), 0, 1) * 2 - 1),
        "Key3D": ("keypoints3d", lambda v: np.clip(v / 2**16, 0, 1) * 2 - 1),
        "N": ("normal", lambda v: v / 127.5 - 1),
        "PC": ("principal_curvature", lambda v: np.stack([(v[0] - 123.572) / 31.922, (v[1] - 120.1) / 21.658])),
        "R": ("reshading", lambda v: v / 127.5 - 1),
        "S2D": ("segment_unsup2d", lambda v: v / 127.5 - 1),
        "S25D": ("segment_unsup25d", lambda v: v / 127.5 - 1),
    }
    mirrored = set()
    for draw in (None, *range(6)):
        image, labels = data.train[1, draw]
        mirror = draw is not None and np.random.default_rng((draw, 1)).random() < 0.5
        mirrored.add(mirror)
        for name, (folder, scale) in folders.items():
            want = scale(quarter(folder))
            want = want[:, :, ::-1] * (np.array([-1, 1, 1])[:, None, None] if name == "N" else 1) if mirror else want
            np.testing.assert_allclose(labels[name].numpy(), want, rtol=1e-4, atol=1e-4, err_msg=name)
        want = quarter("rgb") / 127.5 - 1
        np.testing.assert_allclose(image.numpy(), want[:, :, ::-1] if mirror else want, atol=1e-5)
    assert mirrored == {True, False}


@given(st.integers(1, 9), st.integers(0, 5), st.integers(36, 80), st.integers(36, 80))
@settings(deadline=None, derandomize=True, max_examples=15)
def test_two_garments_are_those_of_the_files(tmp_path_factory, count, seed, height, width):
    root = tmp_path_factory.mktemp("fashion")
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 28, 28), np.uint8) * (random.random((count, 28, 28)) < 0.4)
    garments = random.integers(0, 10, count, np.uint8)
    for part in ("train", "t10k"):
        head = bytes((0, 0, 8, 3)) + np.array([count, 28, 28], ">u4").tobytes()
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.astype(np.uint8).tobytes()))
        head = bytes((0, 0, 8, 1)) + np.array([count], ">u4").tobytes()
        (root / f"{part}-labels-idx1-ubyte").write_bytes(head + garments.tobytes())
    names = ("top_left", "bottom_right", "same_kind", "overlap")
    data = open_data("fashion", Options(root=root, size=(height, width), tasks=names))
    times = min(height, width) // 36
    top, left = (height - 36 * times) // 2, (width - 36 * times) // 2
    firsts, seconds = [], []
    for index in range(count):
        image, labels = data.train[index, index]
        grey = image[0].numpy() * STD[0] + MEAN[0]
        grey = np.rint(grey[top : top + 36 * times : times, left : left + 36 * times : times] * 255)
        pairs = [
            (i, j)
            for i in range(count)
            for j in range(count)
            if (canvas(images[i], images[j]).max(0) == grey).all() and garments[i] == labels["top_left"]
        ]
        assert len(pairs) == 1
        (i, j), layers = pairs[0], canvas(*images[list(pairs[0])])
        firsts.append(i)
        seconds.append(j)
        assert garments[j] == labels["bottom_right"]
        both, either = ((layers > 0).all(0).sum(), (layers > 0).any(0).sum())
        assert labels["overlap"].item() == pytest.approx(both / either)
        kinds = ["tops", "trousers", "tops", "dress", "tops", "shoe", "tops", "shoe", "bag", "shoe"]
        assert labels["same_kind"] == (kinds[garments[i]] == kinds[garments[j]])
    assert sorted(firsts) == sorted(seconds) == list(range(count))


def canvas(first, second):
    layers = np.zeros((2, 36, 36), int)
    layers[0, :28, :28], layers[1, 8:, 8:] = first, second
    return layers


def test_what_an_item_is_not_drawn_from(roots):
    """Neither NumPy's nor torch's own random state decides about an item, nor is it used up."""
    for name in ("nyud", "taskonomy"):
        size = SIZE if name == "nyud" else (64, 96)
        items = open_data(name, Options(root=roots / name, size=None if name == "nyud" else size)).train
        found = []
        for seed in (0, 1):
            np.random.seed(seed)
            torch.manual_seed(seed)
            before = np.random.get_state()[1].copy(), torch.get_rng_state()
            found.append(items[1, 5])
            assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])
        assert torch.equal(found[0][0], found[1][0])
