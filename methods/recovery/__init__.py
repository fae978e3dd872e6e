"""Fine-tuning of what a method has compressed, by one recipe for all methods.

settings      the recipe, its sources, and what `--set lora.FIELD=VALUE` changes of it (no torch)
adapters      low-rank adapters around the projections of a model, and how they become part of the weights
fine_tuning   the training
"""

from methods.recovery.settings import KINDS, Recovery, configure, require_package, would_fill_zeros

__all__ = ["KINDS", "Recovery", "configure", "require_package", "would_fill_zeros"]
