"""The rendered rooms: same bits however they are asked for, labels that agree with the geometry and with each other."""

import hashlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.paper.__main__ import main
from benchmarks.rooms import scenes as module
from benchmarks.rooms.batch import pack
from benchmarks.rooms.furniture import colour, look
from benchmarks.rooms.labels import CLASSES, IGNORE, PARTS, SEMSEG
from benchmarks.rooms.pictures import colorize, decode
from benchmarks.rooms.raycast import CYLINDER, SPHERE, reaches
from benchmarks.rooms.rooms import furnished_room
from benchmarks.rooms.scenes import Scenes, render

COUNT = 64


@pytest.fixture(scope="module")
def rendered():
    return render(range(COUNT))


def world(labels, index):
    """Normals of a scene in the world, (3, H, W)."""
    axes = pack([furnished_room(f"train/0/{index}")]).axes[..., 0, 0]  # rows right, down, forward
    return np.einsum("ai,ahw->ihw", axes, labels["normals"][index].numpy())


def digest(images, labels):
    return hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in (images, *labels.values()))).hexdigest()


# ---- the data set's contract


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (90, 16)])
def test_shapes_and_dtypes(size):
    image, labels = Scenes(3, size)[2]
    flat, deep = torch.int64, torch.float32
    want = {"semseg": (flat, ()), "depth": (deep, (1,)), "normals": (deep, (3,)), "edges": (deep, (1,))}
    want |= {"saliency": (flat, ()), "parts": (flat, ()), "albedo": (deep, (3,))}
    assert image.dtype == deep and image.shape == (3, *size)
    assert {task: (y.dtype, y.shape) for task, y in labels.items()} == {
        task: (dtype, (*channels, *size)) for task, (dtype, channels) in want.items()
    }
    assert image.min() >= 0 and image.max() <= 1


def test_only_the_tasks_asked_for():
    assert list(Scenes(1, (16, 16), tasks=("depth", "parts"))[0][1]) == ["depth", "parts"]
    assert len(Scenes(0)) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"length": -1}, "length must be at least 0, got -1"),
        ({"size": (64, 8)}, r"size must be \(height, width\), each at least 16, got \(64, 8\)"),
        ({"size": (64,)}, "size must be"),
        ({"split": "test"}, "split must be one of train, val, got 'test'"),
        ({"tasks": ("depth", "colour")}, "tasks must be among .*, got 'colour'"),
    ],
)
def test_bad_arguments_name_the_culprit(arguments, says):
    with pytest.raises(ValueError, match=says):
        Scenes(**{"length": 1} | arguments)


@pytest.mark.parametrize("index", [-1, 4])
def test_no_such_scene(index):
    with pytest.raises(IndexError, match=rf"index must be in \[0, 4\), got {index}"):
        Scenes(4)[index]


# ---- determinism


def test_same_bits_alone_in_a_batch_and_in_a_worker(rendered):
    images, labels = rendered
    data = Scenes(COUNT)
    for i in (0, 7, 20):
        image, alone = data[i]
        assert torch.equal(image, images[i])
        assert all(torch.equal(alone[task], labels[task][i]) for task in CLASSES)
    shuffled, _ = render([9, 3, 50, 3])
    assert torch.equal(shuffled, images[[9, 3, 50, 3]])
    batch, worked = next(iter(DataLoader(data, batch_size=5, num_workers=1)))
    assert torch.equal(batch, images[:5]) and all(torch.equal(worked[task], labels[task][:5]) for task in CLASSES)


def test_same_bits_with_any_number_of_rays_together(monkeypatch):
    want = digest(*render(range(6), (31, 45)))
    monkeypatch.setattr(module, "_RAYS", 4 * 31 * 45)
    assert digest(*render(range(6), (31, 45))) == want


def test_same_bits_in_another_process():
    code = f"from {__name__} import digest, render; print(digest(*render(range(3), (24, 40), 5, 'val')))"
    code = f"import sys; sys.path[:0] = {sys.path!r}; {code}"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == digest(*render(range(3), (24, 40), 5, "val"))


def test_seeds_and_splits_differ():
    views = [render(range(4), (32, 32), seed, split)[0] for seed in (0, 1) for split in ("train", "val")]
    images = torch.cat(views).flatten(1)
    assert torch.cdist(images, images).fill_diagonal_(99).min() > 1


# ---- labels against the geometry


def test_rays_meet_solids_where_the_solids_are():
    """Sampled in float64: nothing before the hit, the solid behind it, and shadows where something is in the way."""
    batch = pack([furnished_room(f"train/0/{i}") for i in range(8)])
    x, y = (v.reshape(1, -1).astype(np.float32) for v in np.meshgrid(np.arange(1.5, 48, 3), np.arange(0.5, 48, 3)))
    view = module._look_at(batch, x, y, (48, 48))
    hit, lit = view.hit, view.lit
    solids = batch.solids

    def inside(k, point):  # (3, B, N) -> (B, N)
        cos, sin = solids.turn[k].astype(float)
        px, py, pz = point - solids.centre[k]
        p = np.stack([cos * px + sin * py, cos * py - sin * px, pz]) / solids.half[k]
        round_ = {CYLINDER: np.hypot(p[0], p[1]), SPHERE: np.sqrt((p**2).sum(0))}
        flat = {CYLINDER: np.abs(p[2]), SPHERE: 0}
        kind = solids.kinds[k]
        return np.maximum(round_[kind], flat[kind]) < 1 if kind in round_ else np.abs(p).max(0) < 1

    def any_inside(point, slots):
        return np.any([inside(k, point) for k in slots], 0)

    eye, point = batch.eye.astype(float), hit.point.astype(float)
    everything, casters = range(1, len(solids.kinds)), [k for k, casts in enumerate(solids.casts) if casts]
    for t in np.linspace(0.02, 0.999, 60):
        assert not any_inside(eye + t * (point - eye), everything).any()
    behind = point - 1e-4 * hit.normal
    met = np.stack([inside(k, behind) for k in range(len(solids.kinds))])
    met[0] = ~met[0]
    assert np.take_along_axis(met, hit.solid[None].astype(int), 0).mean() > 0.998

    start, light = point + 0.004 * hit.normal, batch.light.at.astype(float)
    blocked = np.zeros(lit.shape, bool)
    entry = np.zeros(lit.shape, bool)
    for t in np.concatenate([np.linspace(0.0005, 0.03, 40), np.linspace(0.03, 1, 500)]):
        blocked |= any_inside(start + t * (light - start), casters)
        entry |= inside(1, start + t * (light - start))
    free = reaches(solids, batch.light.at, start.astype(np.float32), batch.light.outside > 0)
    lamp = batch.light.outside[..., 0] == 0
    assert (free[lamp] == ~blocked[lamp]).mean() > 0.99
    assert not (free & blocked).mean() > 0.005


def test_normals_are_unit_and_face_the_viewer(rendered):
    normals = rendered[1]["normals"]
    assert (normals.norm(dim=1) - 1).abs().max() < 1e-5
    for i in range(4):
        room = furnished_room(f"train/0/{i}")
        scale = np.tan(room.fov / 2) / 32
        y, x = (np.mgrid[0:64, 0:64] + 0.5 - 32) * scale
        ray = np.stack([x, y, np.ones_like(x)])
        assert ((ray * normals[i].numpy()).sum(0) < 1e-3).all()


def test_normals_are_the_depth_s(rendered):
    """Finite differences of the back-projected depth, on pixels whose neighbours share their flat face."""
    labels = rendered[1]
    checked = 0
    for i in range(16):
        room = furnished_room(f"train/0/{i}")
        z, n = labels["depth"][i, 0].double().numpy(), labels["normals"][i].double().numpy()
        y, x = (np.mgrid[0:64, 0:64] + 0.5 - 32) * np.tan(room.fov / 2) / 32
        p = np.stack([x * z, y * z, z])
        cross = np.cross(p[:, 1:-1, 2:] - p[:, 1:-1, :-2], p[:, 2:, 1:-1] - p[:, :-2, 1:-1], axis=0)
        cross /= -np.linalg.norm(cross, axis=0)
        edge = labels["edges"][i, 0].numpy() > 0
        smooth = ~(edge[1:-1, 1:-1] | edge[1:-1, :-2] | edge[:-2, 1:-1] | edge[1:-1, 2:] | edge[2:, 1:-1])
        flat = smooth & (np.abs(n[:, 1:-1, 2:] - n[:, 1:-1, :-2]).max(0) < 1e-6)
        flat &= np.abs(n[:, 2:, 1:-1] - n[:, :-2, 1:-1]).max(0) < 1e-6
        angle = np.degrees(np.arccos(np.clip((cross * n[:, 1:-1, 1:-1]).sum(0), -1, 1)))
        assert angle[flat].max() < 1
        checked += flat.sum()
    assert checked > 16 * 1000


def test_floors_face_up_and_ceilings_down(rendered):
    labels = rendered[1]
    for i in range(8):
        up = world(labels, i)[2]
        for name, want in (("floor", 1), ("ceiling", -1), ("wall", 0)):
            assert np.abs(up[labels["semseg"][i].numpy() == SEMSEG.index(name)] - want).max(initial=0) < 1e-5
        top = labels["parts"][i].numpy() == PARTS.index("box top")
        assert np.abs(up[top] - 1).max(initial=0) < 1e-5


def test_edges_lie_exactly_between_faces(rendered):
    batch = pack([furnished_room("train/0/5")])
    x = (np.arange(64 * 64) % 64 + 0.5)[None].astype(np.float32)
    y = (np.arange(64 * 64) // 64 + 0.5)[None].astype(np.float32)
    hit = module._look_at(batch, x, y, (64, 64)).hit
    face = np.stack([hit.solid, hit.face], -1).reshape(64, 64, 2)
    want = np.zeros((64, 64), bool)
    for r in range(64):
        for c in range(64):
            want[r, c] = any((face[r, c] != face[s, d]).any() for s, d in ((r, c + 1), (r + 1, c)) if s < 64 and d < 64)
    assert (rendered[1]["edges"][5, 0].numpy() == want).all()


def test_classes_and_parts_change_only_across_edges(rendered):
    labels = rendered[1]
    edges = labels["edges"][:, 0] > 0
    for task in ("semseg", "saliency"):
        y = labels[task]
        assert edges[:, :, :-1][y[:, :, 1:] != y[:, :, :-1]].all()
        assert edges[:, :-1][y[:, 1:] != y[:, :-1]].all()
    halves = torch.tensor([PARTS.index("sphere upper"), PARTS.index("sphere lower")])
    y = labels["parts"].masked_fill(torch.isin(labels["parts"], halves), halves[0])  # an equator is no crease
    assert edges[:, :-1][y[:, 1:] != y[:, :-1]].all()


def test_albedo_is_what_no_light_changes(monkeypatch):
    """The same rooms under another light: another image, the same albedo; a plain paint's is its colour."""
    images, labels = render(range(4))

    def relit(seed):
        room = furnished_room(seed)
        dimmed = [0.3 * c for c in room.light.colour], [2 * c for c in room.light.sky]
        room.light = room.light._replace(colour=dimmed[0], sky=dimmed[1])
        return room

    monkeypatch.setattr(module, "furnished_room", relit)
    others, again = render(range(4))
    assert (others - images).abs().mean() > 0.02 and torch.equal(again["albedo"], labels["albedo"])
    assert labels["albedo"].min() >= 0 and labels["albedo"].max() <= 1

    def painted(seed):
        room = furnished_room(seed)
        room.looks = (look("4080c0"),) * 3
        return room

    monkeypatch.setattr(module, "furnished_room", painted)
    (albedo,), (classes,) = (render([0])[1][task] for task in ("albedo", "semseg"))
    assert torch.equal(albedo[:, classes == SEMSEG.index("wall")].unique(dim=1)[:, 0], torch.tensor(colour("4080c0")))


# ---- what the pictures hold


def test_depth_is_a_room_s(rendered):
    depth = rendered[1]["depth"]
    assert depth.isfinite().all() and depth.min() > 0.1 and depth.max() < 8


def test_every_class_appears(rendered):
    for task in ("semseg", "saliency", "parts"):
        assert set(rendered[1][task].unique().tolist()) - {IGNORE} == set(range(len(CLASSES[task]))), task


def test_every_picture_shows_furniture(rendered):
    images, labels = rendered
    assert ((labels["semseg"] >= SEMSEG.index("table")).flatten(1).float().mean(1) > 0.02).float().mean() > 0.95
    salient = (labels["saliency"] == 1).flatten(1).float().mean(1)
    assert (salient > 0).float().mean() > 0.95 and salient.max() < 0.6
    brightness = images.flatten(1).mean(1)
    assert brightness.min() > 0.15 and brightness.max() < 0.85


def test_camera_stands_free():
    for i in range(100):
        room = furnished_room(f"val/1/{i}")
        x, y, z = room.eye
        assert 0 < x < room.size[0] and 0 < y < room.size[1] and 0 < z < room.size[2]
        boxes = np.array(room.taken[1:])
        assert not ((boxes[:, 0] < x) & (x < boxes[:, 1]) & (boxes[:, 2] < y) & (y < boxes[:, 3])).any()


def test_speed():
    """Of the process, whatever else the machine does; a tenth of what is usual, below which something is wrong."""
    render(range(2))
    start = time.process_time()
    render(range(COUNT))
    rate = COUNT / (time.process_time() - start)
    print(f"{rate:.0f} images of 64 x 64 with all labels per second of one core")
    assert rate > 10


# ---- pictures and the command


def test_every_label_and_prediction_has_a_picture(rendered):
    images, labels = rendered
    assert colorize("image", images[0].numpy()).shape == (64, 64, 3)
    for task, classes in CLASSES.items():
        output = np.random.default_rng(0).normal(size=(len(classes) or len(labels[task][0]), 64, 64))
        for array in (labels[task][0].numpy(), decode(task, output)):
            picture = colorize(task, array)
            assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.std() > 0
    with pytest.raises(ValueError, match="task must be"):
        colorize("colour", images[0].numpy())


def test_command_draws_a_sheet(tmp_path, capsys):
    from PIL import Image

    path = tmp_path / "sheet.png"
    assert main(["scenes", "--show", str(path), "--count", "2", "--size", "24", "32"]) == 0
    assert Image.open(path).size[0] > 1000
    assert "images of 64 × 64 with all labels per second" in capsys.readouterr().out
