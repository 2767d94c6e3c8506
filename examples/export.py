"""One task leaves: a file for torch alone, and one for ONNX Runtime: ``python examples/export.py``.

An expanded model predicts three tasks; the robot needs the depth of one image and has no room for the rest, nor for
this package. ``export_task(..., plain=True)`` leaves that task's stream, made of torch's own operators.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import dtme

TASKS = ("semseg", "depth", "normals")
ROBOT = """
import sys, torch
depth = torch.export.load(sys.argv[1]).module()
print(f"a process without dtme: {tuple(depth(torch.load(sys.argv[2])).shape)}")
torch.save(depth(torch.load(sys.argv[2])), sys.argv[3])
assert "dtme" not in sys.modules
"""


def trained_model() -> dtme.MultiTaskModel:
    """What training would leave: here the plan is made by hand, and modulations and tokens are drawn."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    backbone = ViTModel(ViTConfig(**size, image_size=32, patch_size=8), add_pooling_layer=False)
    model = dtme.MultiTaskModel(backbone, {task: nn.Linear(32, 1 + i) for i, task in enumerate(TASKS)})
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 4, {"layers.1": TASKS}, {"layers.1": TASKS, "layers.2": ("depth",)}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dtme." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def save_program(depth: nn.Module, image: Tensor, path: Path) -> None:
    """A file that ``torch.export.load`` reads, for batches of any size."""
    shapes = ({0: torch.export.Dim("batch", max=64)},)
    torch.export.save(torch.export.export(depth, (image,), dynamic_shapes=shapes), path)


def save_onnx(depth: nn.Module, image: Tensor, path: Path) -> None:
    shapes = ({0: torch.export.Dim("batch", max=64)},)
    torch.onnx.export(depth, (image,), path, dynamic_shapes=shapes, dynamo=True, verbose=False)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    from onnxruntime import InferenceSession

    session = InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(found)


def main() -> None:
    model = trained_model()
    depth = model.export_task("depth", plain=True)
    images = torch.randn(5, 3, 32, 32)
    want = model(images, tasks="depth")["depth"].detach()
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, depth)]
    print(f"{sizes[0]:,} parameters for three tasks, {sizes[1]:,} for depth")
    with TemporaryDirectory() as place:
        folder = Path(place)
        save_program(depth, images[:2], folder / "depth.pt2")
        torch.save(images, folder / "images.pt")
        files = [folder / name for name in ("depth.pt2", "images.pt", "out.pt")]
        subprocess.run([sys.executable, "-c", ROBOT, *files], check=True, cwd=folder)
        torch.testing.assert_close(torch.load(folder / "out.pt"), want, rtol=1e-4, atol=1e-5)
        save_onnx(depth, images[:2], folder / "depth.onnx")
        torch.testing.assert_close(run_onnx(folder / "depth.onnx", images), want, rtol=1e-4, atol=1e-5)
    print("torch.export and ONNX Runtime: the same depth")


if __name__ == "__main__":
    main()
