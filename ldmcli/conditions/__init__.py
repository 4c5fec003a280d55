"""What a model is conditioned on (Sec. 3.3): each condition y is one file here, and one entry of `CONDITIONS`.

A `Condition` says where values come from (rows, people), what is learned from data about them, and how they are shown
and kept. Its conditioner, a network of `ldmcli.networks`, is τ_θ. A condition of one's own is a subclass with a
conditioner, added by `CONDITIONS[NAME] = MyCondition()`.
"""

from ldmcli.conditions.class_ import Class
from ldmcli.conditions.condition import Condition
from ldmcli.conditions.layout import BoxLayout
from ldmcli.conditions.lowres import LowRes
from ldmcli.conditions.masked import Masked
from ldmcli.conditions.semantic_map import SemanticMap
from ldmcli.conditions.text import Text
from ldmcli.conditions.tokens import Tokens
from ldmcli.networks.conditioners import CONDITIONERS

__all__ = ["CONDITIONS", "Condition"]


class Conditions(dict[str, Condition]):
    """Conditions by name. What is added brings its conditioner along, so that models can be built with it."""

    def __setitem__(self, name: str, condition: Condition) -> None:
        CONDITIONERS[name] = condition.conditioner
        super().__setitem__(name, condition)

    def __delitem__(self, name: str) -> None:
        del CONDITIONERS[name]
        super().__delitem__(name)


CONDITIONS = Conditions(
    {one.name: one for one in (Text(), Class(), BoxLayout(), SemanticMap(), LowRes(), Masked(), Tokens())}
)
