"""Decoder families: where the parts of a Hugging Face decoder are and what its config means. One file per family.

To support another architecture, write a `Family` beside `llama.py`, add it to `FAMILIES`, and give it a pair of classes
in `methods/modeling/compressed.py`; `tests/methods/test_families.py` then checks it.
"""

from methods.errors import UserError
from methods.modeling.families.base import COMPRESSED_PREFIX, Family
from methods.modeling.families.llama import LLAMA
from methods.modeling.families.opt import OPT
from methods.modeling.families.phi import PHI
from methods.modeling.families.qwen2 import QWEN2

__all__ = ["COMPRESSED_PREFIX", "FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, QWEN2, PHI, OPT)}


def family_of(model_type: str) -> Family:
    """The family of a `model_type`, dense or compressed.

    Raises:
        UserError: no adapter for it.
    """
    base = model_type.removeprefix(COMPRESSED_PREFIX)
    if base not in FAMILIES:
        raise UserError(
            f"the architecture {model_type!r} is not supported. Supported: {', '.join(sorted(FAMILIES))}. "
            "Use a model of one of these, or add an adapter in methods/modeling/families/."
        )
    return FAMILIES[base]
