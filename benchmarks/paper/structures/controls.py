"""Joint training that is given what the method takes: its compute, or a backbone that does not train."""

from dataclasses import dataclass

from torch import nn

from ..arms import Facts, Setting


@dataclass(frozen=True)
class Longer:
    """The jointly trained model as it is, for as many steps more as cost the compute of TM + TE in its own steps.

    Compute is counted in passes of the plain model's blocks (``dtme.ExpansionPlan.compute``), heads left out: they cost
    the same per step, so that this arm has a little more compute than TM + TE.
    """

    def apply(self, setting: Setting) -> tuple[nn.Module, Facts]:
        plan = setting.report.plan(
            modulation=setting.modulation, expansion=setting.expansion, num_tokens=setting.num_tokens
        )
        return setting.model, {"added": 0, "passes": plan.compute()}


class Frozen:
    """The joint model, of which only the heads train on."""

    def apply(self, setting: Setting) -> tuple[nn.Module, Facts]:
        setting.model.backbone.requires_grad_(False)
        return setting.model, {"added": 0, "freeze_backbone": True}
