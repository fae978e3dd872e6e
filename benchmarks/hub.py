"""What of the Hugging Face hub is on this machine or within reach: asked before any work starts, without torch.

`huggingface_hub` keeps models and `datasets` keeps prepared data sets in caches of their own; both are looked at here.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from methods.errors import UserError

WEIGHTS = "model.safetensors"


class OutOfReach(UserError):
    """The hub does not answer, which does not matter for what is whole in the cache."""


def cached(repository: str, file: str) -> Path | None:
    """A file of a model repository on this machine, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file)
    return Path(path) if isinstance(path, str) else None


def missing_weights(folder: Path) -> list[str]:
    """The weight files that a checkpoint's folder lacks: its index names the shards, without one there is one file.

    Raises:
        UserError: the index cannot be read.
    """
    index = folder / f"{WEIGHTS}.index.json"
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else {WEIGHTS}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f'{index} is damaged: it is not JSON with a "weight_map". Copy or download the checkpoint again.'
        ) from None
    return sorted(file for file in files if not (folder / file).is_file())


def cached_dataset(repository: str, config: str, split: str = "") -> bool:
    """Whether `datasets` has prepared this configuration (and split) of a data set before."""
    from huggingface_hub import constants

    root = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    organisation, _, name = repository.rpartition("/")
    snake_case = re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    # The layout is <org>___<name>/<config>[-<hash of data files>]/<version>/<commit>/<name>-<split>.arrow
    files = root.glob(f"{organisation}___{snake_case}/{config}*/*/*/*.arrow")
    # While a data set is being prepared, its <commit> ends in .incomplete.
    return any(f"-{split}" in file.name and file.parent.suffix != ".incomplete" for file in files)


def prepared_commit(rows: Any) -> str:
    """The commit of a loaded split (`datasets` keeps it under .../<version>/<commit>/<file>), else its version."""
    return Path(rows.cache_files[0]["filename"]).parent.name if rows.cache_files else str(rows.info.version)


def check_model(repository: str, offline: bool) -> None:
    """Make sure that a model is in the cache or, unless `offline`, on a hub within reach.

    Raises:
        UserError: it is not; the message says what to type.
    """
    from huggingface_hub import constants

    command = f"hf download {repository}"
    config = cached(repository, "config.json")
    whole = config is not None and not missing_weights(config.parent)
    if not (offline or constants.HF_HUB_OFFLINE):
        try:
            _ask(repository, "model", "config.json", command)
        except OutOfReach:
            if not whole:
                raise
    elif not whole:
        raise _absent(f"the model {repository}", constants.HF_HUB_CACHE, command)


def check_dataset(repository: str, config: str, offline: bool, split: str = "", command: str = "") -> None:
    """The same for one configuration of a data set, and for one split if it is named.

    Args:
        command: what fetches it; empty: `datasets.load_dataset` of the whole.

    Raises:
        UserError: it cannot be had; the message says what to type.
    """
    from huggingface_hub import constants

    if cached_dataset(repository, config, split):
        return
    arguments = f'"{repository}"' + (f', "{config}"' if config != "default" else "")
    command = command or f"python -c 'import datasets; datasets.load_dataset({arguments})'"
    if offline or constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        raise _absent(f"the data set {repository} ({config})", f"{constants.HF_HOME}/datasets", command)
    _ask(repository, "dataset", "README.md", command)


def _absent(what: str, where: str, command: str) -> UserError:
    return UserError(
        f"{what} is not whole in the local cache ({where}) and this run may not ask the hub. "
        f"Type, where there is a network: {command}"
    )


def _ask(repository: str, kind: str, file: str, command: str) -> None:
    """Fetch one small file, which also notes the repository's commit; turn what can go wrong into one paragraph."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # Fails at once without a network, where a download would try again for half a minute.
        HfApi().repo_info(repository, repo_type=kind, timeout=10)
        hf_hub_download(repository, file, repo_type=kind)
    except GatedRepoError:
        page = f"https://huggingface.co/{repository}"
        raise UserError(f"{repository} is gated: accept its licence on {page}, then type: hf auth login") from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no public {kind} {repository}. Check the name, or type: hf auth login") from None
    except Exception as error:  # whatever the HTTP library of the day raises when the hub is out of reach
        reason = " ".join(str(error).split())[:120]
        raise OutOfReach(
            f"the {kind} {repository} is not whole in the local cache and the hub cannot be reached ({reason}). "
            f"Type, where there is a network: {command}"
        ) from None
