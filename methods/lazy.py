"""Modules that are imported on first use.

Listing and planning read the methods' names, fields and arithmetic but touch no tensor, and must not wait seconds for
torch. Method files therefore write `from methods.lazy import torch` and use it inside functions only.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _OnFirstUse:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    torch = _OnFirstUse("torch")
