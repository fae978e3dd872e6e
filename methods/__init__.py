"""Compression methods for language models, and the vocabulary they share.

`import methods` also makes compressed checkpoints loadable: `AutoModelForCausalLM.from_pretrained(directory)`. It costs
nothing until transformers is imported.
"""

import importlib

import wrapt

# One line per method: importing a method's module registers it.
from methods import (
    cmoe,
    dense,
    disp_llm,
    llama_moe,
    llama_moe_v2,
    llm_pruner,
    llm_surgeon,
    magnitude,
    modegpt,
    moefication,
    pruner_zero,
    random_structures,
    shortgpt,
    sleb,
    slicegpt,
    sparsegpt,
    structured_magnitude,
    tomoe,
    wanda,
)
from methods.registry import configure, get, names, register

__all__ = [
    "cmoe",
    "configure",
    "dense",
    "disp_llm",
    "get",
    "llama_moe",
    "llama_moe_v2",
    "llm_pruner",
    "llm_surgeon",
    "magnitude",
    "modegpt",
    "moefication",
    "names",
    "pruner_zero",
    "random_structures",
    "register",
    "shortgpt",
    "sleb",
    "slicegpt",
    "sparsegpt",
    "structured_magnitude",
    "tomoe",
    "wanda",
]


@wrapt.when_imported("transformers")
def _register_auto_classes(module: object) -> None:
    importlib.import_module("methods.modeling.config")
