"""The make of one mixture as its record says it: what a checkpoint needs to know before it can be loaded.

Of ToMoE's mixtures a record has `experts`, `width` and `neurons`; whatever else there is has the value that makes those
mixtures, and is written only where it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

RouterKind = Literal["linear", "mlp", "cosine mlp", "analytic", "oracle", "oracle of deviation"]
GateKind = Literal["equal", "softmax", "scaled"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes and kinds."""

    experts: int
    """N: experts among which tokens choose."""
    width: int
    """w: neurons of an expert, of the largest where they differ."""
    neurons: int
    """U: different neurons of all experts, and of the shared part."""
    active: int = 1
    """k: experts that a token gets."""
    shared: int = 0
    """S: neurons that every token gets besides."""
    router: RouterKind = "linear"
    """See `moe_routers`."""
    gate: GateKind = "equal"
    """See `moe_gates`."""
    scale: float = 1.0
    """What the weights of a softmax gate add up to."""
    sizes: list[int] | None = None
    """Neurons of every expert; None: w each."""
    constants: bool = False
    """Whether experts that a token does not get are replaced by constants."""

    @property
    def used(self) -> int:
        """Neurons that one token gets, at most."""
        sizes = self.sizes or [self.width] * self.experts
        return min(self.shared + sum(sorted(sizes)[-self.active :]), self.neurons)

    @property
    def oracular(self) -> bool:
        """Whether the router looks at what every neuron says."""
        return self.router.startswith("oracle")

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Layout:
        """What a record says; it may say other things too."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})

    def record(self) -> dict[str, Any]:
        """As JSON."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}
