"""What is labelled in a room: the kinds of labels, and what the classes are called."""

IGNORE = 255
"""Label of a pixel that no class loss and no class metric counts."""

SEMSEG = (
    "floor", "wall", "ceiling", "window", "door", "picture", "rug",
    "table", "seat", "cabinet", "lamp", "plant", "ball", "vessel", "box",
)  # fmt: skip
PARTS = ("box top", "box side", "leg", "cylinder end", "cylinder side", "sphere upper", "sphere lower")
SALIENCY = ("background", "salient")

CLASSES: dict[str, tuple[str, ...]] = {
    "semseg": SEMSEG,
    "depth": (),
    "normals": (),
    "edges": (),
    "saliency": SALIENCY,
    "parts": PARTS,
    "albedo": (),
}
"""Every kind of label, with its classes; none for a regression."""
