"""The rivals of ``dtme.rivals`` as structures of an arm, sized to the reference plan."""

from dataclasses import dataclass

from torch import nn

from dtme.rivals import Rival

from ..arms import Facts, Setting


@dataclass(frozen=True)
class OfEqualSize:
    """A rival with as many parameters of its tasks' own as the reference plan adds."""

    rival: type[Rival]

    def apply(self, setting: Setting) -> tuple[nn.Module, Facts]:
        if setting.budget < 1:
            raise ValueError("the reference plan adds nothing (shares of 0): no rival can be of that size")
        return self.rival().fit(setting.model, setting.budget, setting.seed)
