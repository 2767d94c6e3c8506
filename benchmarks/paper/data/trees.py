"""Small trees in the layouts of the public data sets, out of rendered rooms: real files to read, none to learn from.

Which class, part or person stands for what in a room means nothing; that labels and image show the same thing does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
from PIL import Image

from ...rooms import labels as rooms
from ...rooms.scenes import render
from . import nyud, pascal, taskonomy

SIZE = (64, 96)
"""A size, (height, width), that every tree opens with; it is tiled by patches of 8, 16 and 32 pixels."""

Scene = dict[str, np.ndarray]
"""What ``render`` gives of a scene: the image as (H, W, 3) uint8, classes as (H, W), the others as (H, W, C)."""


def write_tree(name: str, root: Path, count: int, seed: int = 0) -> None:
    """Write ``count`` images to train on and as many to validate on, with all labels.

    Args:
        name: ``"nyud"``, ``"pascal"`` or ``"taskonomy"``.
        root: a folder, made if need be, which becomes the root to open: existing files of these names are replaced.

    Raises:
        ValueError: no such data set, or no image.
    """
    if name not in _TREES:
        raise ValueError(f"name must be one of {', '.join(_TREES)}, got {name!r}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    size, write = _TREES[name]
    ids: dict[str, list[str]] = {}
    for split in ("train", "val"):
        images, labels = render(range(count), size, seed, split)
        ids[split] = [f"{split}_{index:04d}" for index in range(count)]
        for index, id in enumerate(ids[split]):
            scene = {task: label[index].numpy() for task, label in labels.items()}
            scene = {task: label.transpose(1, 2, 0) if label.ndim == 3 else label for task, label in scene.items()}
            pixels = images[index].numpy().transpose(1, 2, 0)
            write(root, id, scene | {"image": np.rint(pixels * 255).astype(np.uint8)}, index)
    if name == "taskonomy":
        rows = ["id,train,val,test", "train,1,0,0", "val,0,1,0", "test,0,0,1"]
        _text(root / taskonomy.SPLITS, rows)
        return
    splits = (nyud.Nyud if name == "nyud" else pascal.Pascal).splits
    for split, path in splits.items():
        _text(root / path, ids[split])


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _text(path: Path, lines: list[str]) -> None:
    _made(path).write_text("".join(f"{line}\n" for line in lines))


def _picture(path: Path, pixels: np.ndarray, **options: Any) -> None:
    """``pixels``: (H, W) uint8 or uint16, or (H, W, 3) uint8."""
    Image.fromarray(np.ascontiguousarray(pixels)).save(_made(path), **options)


def _vectors(normals: np.ndarray) -> np.ndarray:
    return np.rint((normals + 1) * 127.5).astype(np.uint8)


def _write_nyud(root: Path, id: str, scene: Scene, index: int) -> None:
    stand_in = [nyud.NAMES.index(_NYUD.get(name, "other prop")) + 1 for name in rooms.SEMSEG]
    classes = np.array(stand_in, np.uint8)[scene["semseg"]]
    classes[scene["edges"][..., 0] == 1] = 0  # as where annotators' outlines do not meet
    depth = scene["depth"][..., 0].astype(np.float32)
    depth[scene["semseg"] == rooms.SEMSEG.index("window")] = 0  # which a depth camera does not see
    normals = _vectors(scene["normals"])
    normals[depth == 0] = 128
    tree = nyud.Nyud(root)
    for what, pixels in (("image", scene["image"]), ("semseg", classes), ("normals", normals)):
        _picture(root / tree.path(what, id), pixels)
    _picture(root / tree.path("edge", id), (scene["edges"][..., 0] * 255).astype(np.uint8))
    np.save(_made(root / tree.path("depth", id)), depth)


_NYUD = {
    "floor": "floor", "wall": "wall", "ceiling": "ceiling", "window": "window", "door": "door", "picture": "picture",
    "rug": "floor mat", "table": "table", "seat": "chair", "cabinet": "cabinet", "lamp": "lamp", "box": "box",
}  # fmt: skip
_PASCAL = {
    "table": "diningtable", "seat": "chair", "plant": "pottedplant", "vessel": "bottle", "picture": "tvmonitor",
    "cabinet": "sofa",
}  # fmt: skip
"""What stands for what; the rest is "other prop" and background."""


def _write_pascal(root: Path, id: str, scene: Scene, index: int) -> None:
    """Images differ in width; every third shows nobody; labels of every other lie in the second folder; every other
    file of parts is of MATLAB's version 7.3."""
    width = scene["image"].shape[1] - 4 * (index % 3)
    scene = {task: label[:, :width] for task, label in scene.items()}
    stand_in = [pascal.NAMES.index(_PASCAL.get(name, "background")) for name in rooms.SEMSEG]
    classes = np.array(stand_in, np.uint8)[scene["semseg"]]
    person = scene["saliency"] == 1 if index % 3 != 2 else np.zeros(classes.shape, bool)
    classes[person] = pascal.PERSON
    classes[scene["edges"][..., 0] == 1] = rooms.IGNORE
    folder = "pascal-context" if index % 2 else "VOC12"
    _picture(root / "semseg" / folder / f"{id}.png", classes)
    tree = pascal.Pascal(root)
    _picture(root / tree.path("image", id), scene["image"], quality=95)
    _picture(root / tree.path("saliency", id), (scene["saliency"] * 255).astype(np.uint8))
    _picture(root / tree.path("normals", id), _vectors(scene["normals"]))
    scipy.io.savemat(_made(root / tree.path("edge", id)), {"LabelMap": (scene["semseg"] + 1).astype(np.uint16)})
    write = write_parts_7_3 if index % 2 else write_parts_5
    write(_made(root / tree.path("parts", id)), id, _objects(person, scene["semseg"] == rooms.SEMSEG.index("seat")))


def _objects(person: np.ndarray, chair: np.ndarray) -> list[dict[str, Any]]:
    """A chair, which has no parts, and if there is a person, its parts from top to bottom, left and right."""
    objects: list[dict[str, Any]] = [{"class": "chair", "class_ind": 9, "mask": chair, "parts": []}]
    if person.any():
        rows, columns = np.nonzero(person)
        height = (np.arange(person.shape[0]) - rows.min()) / (rows.max() + 1 - rows.min())
        left = np.broadcast_to(np.arange(person.shape[1]) < columns.mean(), person.shape)
        bands = (("head", "hair"), ("luarm", "ruarm"), ("lhand", "rlarm"), ("torso", "neck"), ("luleg", "ruleg"))
        parts = []
        for band, names in enumerate((*bands, ("llleg", "rfoot"))):
            inside = person & ((height >= band / 6) & (height < (band + 1) / 6))[:, None]
            masks = {names[0]: inside & left, names[1]: inside & ~left}
            parts += [{"part_name": name, "mask": mask} for name, mask in masks.items() if mask.any()]
        objects.append({"class": "person", "class_ind": pascal.PERSON, "mask": person, "parts": parts})
    return objects


def write_parts_5(path: Path, id: str, objects: list[dict[str, Any]]) -> None:
    """A file of human parts of MATLAB's version 5.

    Args:
        objects: a list of ``{"class": name, "class_ind": number, "mask": (H, W) bool, "parts": [{"part_name": name,
            "mask": (H, W) bool}, ...]}``.
    """

    def structs(items: list[dict[str, Any]]) -> np.ndarray:
        if not items:
            return np.zeros((0, 0))
        array = np.empty((1, len(items)), [(field, object) for field in items[0]])
        for at, item in enumerate(items):
            array[0, at] = tuple(
                structs(value) if isinstance(value, list) else value.astype(np.uint8) if field == "mask" else value
                for field, value in item.items()
            )
        return array

    scipy.io.savemat(path, {"anno": {"imname": id, "objects": structs(objects)}}, do_compression=True)


def write_parts_7_3(path: Path, id: str, objects: list[dict[str, Any]]) -> None:
    """The same in MATLAB's version 7.3, which is HDF5 after 512 bytes of MATLAB's: one struct is a group of its fields,
    many are a group of arrays of references, and arrays are transposed."""
    with h5py.File(path, "w", userblock_size=512) as file:
        targets = file.create_group("#refs#")

        def put(parent: h5py.Group, name: str, value: Any) -> None:
            if isinstance(value, list):
                put_structs(parent, name, value)
                return
            if isinstance(value, str):
                held, kind = np.array([[ord(letter)] for letter in value], np.uint16), "char"
            elif isinstance(value, np.ndarray):
                held, kind = value.astype(np.uint8).T, "logical"
            else:
                held, kind = np.array([[float(value)]]), "double"
            parent.create_dataset(name, data=held).attrs["MATLAB_class"] = np.bytes_(kind)

        def put_structs(parent: h5py.Group, name: str, items: list[dict[str, Any]]) -> None:
            if not items:
                empty = parent.create_dataset(name, data=np.zeros(2, np.uint64))
                empty.attrs["MATLAB_class"], empty.attrs["MATLAB_empty"] = np.bytes_("double"), np.uint8(1)
                return
            group = parent.create_group(name)
            group.attrs["MATLAB_class"] = np.bytes_("struct")
            for field in items[0]:
                if len(items) == 1:
                    put(group, field, items[0][field])
                    continue
                references = np.empty((len(items), 1), h5py.ref_dtype)
                for row, item in zip(references, items, strict=True):
                    key = str(len(targets))
                    put(targets, key, item[field])
                    row[0] = targets[key].ref
                group.create_dataset(field, data=references, dtype=h5py.ref_dtype)

        put_structs(file, "anno", [{"imname": id, "objects": objects}])
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")


def _write_taskonomy(root: Path, id: str, scene: Scene, index: int) -> None:
    height, width = scene["image"].shape[:2]
    depth, normals = scene["depth"][..., 0].astype(np.float64), scene["normals"].astype(np.float64)
    y, x = np.mgrid[:height, :width]
    slant = np.hypot((x + 0.5) / width - 0.5, (y + 0.5) / height - 0.5)
    grey, (down, right) = scene["image"].mean(2), np.gradient(normals, axis=(0, 1))
    texture, bend = np.hypot(*np.gradient(grey)), np.sqrt((down**2 + right**2).sum(2))
    outside = scene["semseg"] == rooms.SEMSEG.index("window")
    values: dict[str, np.ndarray] = {
        "DE": np.where(outside, taskonomy.UNKNOWN_DEPTH, 512 * depth * np.sqrt(1 + slant**2)),
        "DZ": np.where(outside, taskonomy.UNKNOWN_DEPTH, 512 * depth),
        "EO": 600 * scene["edges"][..., 0],
        "ET": 60 * texture,
        "Key2D": 4 * texture,
        "Key3D": 20000 * bend,
        "N": np.where(outside[..., None], 128, _vectors(normals)),
        "PC": np.stack([127 + 40 * right[..., 0], 127 + 40 * down[..., 1], 127 + 0 * bend], 2),
        "R": np.repeat(np.maximum(-normals[..., 2:], 0) * 255, 3, 2),
        "S2D": 30 * (scene["parts"] % 8),
        "S25D": 15 * scene["semseg"],
    }
    building, number = id.rsplit("_", 1)
    pictures = taskonomy.Pictures(root, ())
    view = taskonomy.View(building, f"point_{int(number)}_view_0")
    _picture(root / pictures.path(taskonomy.PHOTOGRAPH, view), scene["image"])
    for task, stored in taskonomy.STORED.items():
        kind = np.uint16 if stored.what == "grey 16" else np.uint8
        pixels = np.rint(values[task]).clip(0, np.iinfo(kind).max).astype(kind)
        _picture(root / pictures.path(stored.folder, view), pixels)


_TREES: dict[str, tuple[tuple[int, int], Callable[[Path, str, Scene, int], None]]] = {
    "nyud": ((60, 88), _write_nyud),
    "pascal": ((60, 96), _write_pascal),
    "taskonomy": ((128, 192), _write_taskonomy),
}
"""The size of the largest image, and what writes one."""
