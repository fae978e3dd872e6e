"""The shape record of a compressed model: `config.compression`, plain JSON that says which structures it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from methods.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SCHEMA = 1
"""Version of the record; a checkpoint with a newer one is refused."""


def structures_of(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The structures a config records, by name.

    Raises:
        UserError: the record is of a newer version than this code knows.
    """
    record = getattr(config, "compression", None) or {"schema": SCHEMA, "structures": {}}
    if record["schema"] > SCHEMA:
        raise UserError(
            f"this checkpoint's compression record has schema {record['schema']}, and this version of tomoe-bench "
            f"reads up to {SCHEMA}. Upgrade tomoe-bench, or compress the model again with this version."
        )
    return record["structures"]


def add_structure(config: PreTrainedConfig, name: str, record: dict[str, Any]) -> None:
    """Record one more structure on a config, in place."""
    config.compression = {"schema": SCHEMA, "structures": {**structures_of(config), name: record}}
