"""What else a task can have of its own for as many parameters: LoRA, BitFit, norms and deep prompts per task."""

from .adapters import BitFit, LoRA, NormAffine, Prompts, Rival

__all__ = ["BitFit", "LoRA", "NormAffine", "Prompts", "Rival"]
