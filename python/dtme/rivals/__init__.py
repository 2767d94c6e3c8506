"""What else a task can have of its own for as many parameters: LoRA, BitFit, norms and deep prompts per task.

``model, facts = LoRA().fit(model, plan.added_parameters(), seed=0)`` is a model of the size of a plan, which takes and
returns what a ``MultiTaskModel`` does. ``dtme.compare`` trains them beside the plan.
"""

from .adapters import BitFit, LoRA, NormAffine, Prompts, Rival

__all__ = ["BitFit", "LoRA", "NormAffine", "Prompts", "Rival"]
