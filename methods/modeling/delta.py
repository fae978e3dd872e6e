"""Delta checkpoints: a compressed model, saved as its difference from the dense model that it was made from.

Methods that choose among weights without changing them (ToMoE, ShortGPT, pruning) leave tensors that the dense model
has too, or some rows and columns of one. A delta says which, and holds the rest (routers, projections, tables):

    save_delta(compressed, AutoModelForCausalLM.from_pretrained(dense), "delta")
    compressed = load_delta("delta", AutoModelForCausalLM.from_pretrained(dense))

`delta.json` has the compressed model's config, the source of every tensor and the identity of the base (a hash over
names, shapes and content of its tensors); `delta.safetensors` has the stored tensors and the lists of rows and columns,
each under a hash of its content, so that equal ones are there once. Tokenizers are left to the base.
"""

import copy
import json
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from methods.errors import UserError
from methods.modeling.content import Dense, digest

SCHEMA = 2
"""Version of `delta.json`; a newer one is refused."""
LARGEST = 0.5
"""Share of the compressed model's bytes from which on a delta is refused: it would save next to nothing."""
RECIPES, TENSORS = "delta.json", "delta.safetensors"

Recipe = dict[str, Any]
"""Where a tensor comes from: `{"stored": hash}`, `{"base": name}`, or of that `"rows": hash` and `"columns": hash`, one
or both. Version 1 had `"axis": 0 or 1, "kept": hash` in their place."""


def save_delta(model: PreTrainedModel, base: PreTrainedModel, folder: str | Path) -> None:
    """Save a compressed model as a delta; neither model is changed.

    Args:
        model: of any structures.
        base: the dense model it was made from, in the same dtype; loaded anew, as methods use up the one they compress.
        folder: made when needed.

    Raises:
        UserError: the delta would be larger than half of the model.
    """
    folder, dense, stored = Path(folder), Dense(base.state_dict()), {}
    state = {name: (tensor, digest(tensor)) for name, tensor in model.state_dict().items()}
    recipes = {name: _recipe(dense, name, *entry, stored) for name, entry in state.items()}
    _require_small(_bytes(stored), _bytes({key: tensor for tensor, key in state.values()}))
    content = {
        "schema": SCHEMA,
        "base": _identity(base, dense),
        "config": json.loads(model.config.to_json_string()),
        "tensors": recipes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / TENSORS)
    (folder / RECIPES).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _recipe(dense: Dense, name: str, tensor: Tensor, key: str, stored: dict[str, Tensor]) -> Recipe:
    """Where a tensor comes from; what has to be stored for it goes to `stored`."""
    if whole := dense.whole(name, key):
        return {"base": whole}
    if part := dense.part(name, tensor):
        lists = {"rows": part.rows, "columns": part.columns}
        kept = {axis: (digest(numbers), numbers) for axis, numbers in lists.items() if numbers is not None}
        stored |= dict(kept.values())
        return {"base": part.name, **{axis: key for axis, (key, _) in kept.items()}}
    stored[key] = tensor.cpu().contiguous()
    return {"stored": key}


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _require_small(delta: int, whole: int) -> None:
    if delta > LARGEST * whole:
        raise UserError(
            f"a delta of this model would hold {delta / whole:.0%} of its {whole / 1e6:.1f} MB: most of its weights "
            "are not rows of weights of the base, as after a rotation (slicegpt) or in projections that are sparse "
            "(wanda), or the base is another model or in another dtype. Name the model it was made from, or save it "
            "whole with save_pretrained."
        )


def _identity(base: PreTrainedModel, dense: Dense) -> dict[str, str]:
    """What tells one base from another; of a path its last part."""
    name, dtype = Path(base.name_or_path or "").name, str(base.dtype).removeprefix("torch.")
    return {"name": name, "model_type": base.config.model_type, "dtype": dtype, "sha256": dense.identity}


def load_delta(folder: str | Path, base: PreTrainedModel) -> PreTrainedModel:
    """The compressed model, as `from_pretrained` of its whole checkpoint would give it, on the base's device.

    Args:
        folder: written by `save_delta`.
        base: the dense model the delta was made on; it stays as it is, and shares nothing with the result.

    Raises:
        UserError: no delta is there, it is of a newer version than this code knows, or it was made on another base.
    """
    content = _read(Path(folder))
    dense, stored = Dense(base.state_dict()), load_file(Path(folder) / TENSORS)
    _require_base(content["base"], base, dense)
    state = {name: _make(recipe, dense.tensors, stored) for name, recipe in content["tensors"].items()}
    config = CONFIG_MAPPING[content["config"]["model_type"]].from_dict(content["config"])
    options = {"dtype": base.dtype, "attn_implementation": base.config._attn_implementation}
    model_class = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    model: Any = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    model.config.name_or_path = model.name_or_path = str(folder)
    model.generation_config = copy.deepcopy(base.generation_config)
    return model.to(base.device)


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / RECIPES).is_file() or not (folder / TENSORS).is_file():
        raise UserError(
            f"there is no delta in {folder}: a delta is a folder with {RECIPES} and {TENSORS}. Name one that "
            "save_delta wrote; whole checkpoints load with AutoModelForCausalLM.from_pretrained."
        )
    content = json.loads((folder / RECIPES).read_text(encoding="utf-8"))
    if content["schema"] > SCHEMA:
        raise UserError(
            f"the delta in {folder} has schema {content['schema']}, and this version of tomoe-bench reads up to "
            f"{SCHEMA}. Upgrade tomoe-bench."
        )
    return content


def _require_base(wanted: dict[str, str], base: PreTrainedModel, dense: Dense) -> None:
    given = _identity(base, dense)
    if given["sha256"] != wanted["sha256"]:

        def told(one: dict[str, str]) -> str:
            return f"{one['name'] or 'a model'} ({one['model_type']}, {one['dtype']}, sha256 {one['sha256'][:12]})"

        raise UserError(
            f"this delta was made on {told(wanted)}, and the base given is {told(given)}. Load the former, unchanged "
            f"and with dtype={wanted['dtype']}, and give that."
        )


def _make(recipe: Recipe, dense: dict[str, Tensor], stored: dict[str, Tensor]) -> Tensor:
    """The tensor that a recipe says."""
    if "stored" in recipe:
        return stored[recipe["stored"]]
    if "axis" in recipe:
        recipe = {"base": recipe["base"], ("rows", "columns")[recipe["axis"]]: recipe["kept"]}
    tensor = dense[recipe["base"]].clone()
    for axis, name in enumerate(("rows", "columns")):
        if name in recipe:
            tensor = tensor.index_select(axis, stored[recipe[name]].int().to(tensor.device))
    return tensor
