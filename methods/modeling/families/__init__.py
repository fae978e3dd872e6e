"""Decoder families: where the parts of a Hugging Face decoder are and what its config means. One file per family.

To support another architecture, write a `Family` beside `llama.py`, add it to `FAMILIES`, give it a config class in
`methods/modeling/config.py` (and `CONFIGS`) and a model class in `methods/modeling/compressed.py` (and `MODELS`), and
add it to `tests/methods/tiny.py`: the contract tests then run on it.
"""

from methods.errors import UserError
from methods.modeling.families.base import COMPRESSED_PREFIX, Family
from methods.modeling.families.llama import LLAMA
from methods.modeling.families.opt import OPT
from methods.modeling.families.phi import PHI
from methods.modeling.families.qwen2 import QWEN2
from methods.modeling.families.qwen3 import QWEN3

__all__ = ["COMPRESSED_PREFIX", "FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, QWEN2, QWEN3, PHI, OPT)}


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
