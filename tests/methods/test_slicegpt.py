"""SliceGPT against its invariances, a brute-force PCA, the counts of the authors' repository, and itself on disk."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import methods
from methods import modeling
from methods.base import Batch, Budget, Context
from methods.errors import UserError
from methods.modeling import DecoderLayer, Signals
from methods.modeling.config import compressed_config
from methods.modeling.footprint import footprint
from methods.modeling.shape import DecoderShape
from methods.slicegpt import SliceGPT, Slicer, fold_norms, sliced_size
from tests.methods.tiny import CONFIGS, ONE_PER_FAMILY, RandomCalibration, logits, some_ids, tiny_config, tiny_model

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
OPT_125M = {"model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072}
OPT_125M |= {"num_attention_heads": 12, "max_position_embeddings": 2048}
PHI_2 = {"model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "num_hidden_layers": 32}
PHI_2 |= {"intermediate_size": 10240, "num_attention_heads": 32, "max_position_embeddings": 2048}
LLAMA_2_7B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32}
LLAMA_2_7B |= {"intermediate_size": 11008, "num_attention_heads": 32, "max_position_embeddings": 4096}


def context(tmp_path: Path, seed: int = 0) -> Context:
    return Context(scratch=tmp_path, seed=seed)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_fold_norms_keeps_the_function(name: str) -> None:
    model = tiny_model(name)
    expected = logits(model)
    decoder = modeling.Decoder(model)
    with torch.no_grad():
        fold_norms(decoder)
    for layer in decoder.layers:
        modeling.convert_layer(layer, decoder.shape.hidden)
    modeling.replace_norm(model, decoder.family.final_norm, decoder.shape.hidden)
    assert relative(logits(model), expected) < 1e-9


def test_subtracting_the_embedding_mean_is_no_invariance_of_rms_norm() -> None:
    model = tiny_model("llama-gqa")
    expected = logits(model)
    with torch.no_grad():
        table = modeling.Decoder(model).embeddings[0]
        table.weight -= table.weight.mean(1, keepdim=True)
    assert relative(logits(model), expected) > 1e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("orientation", ["random", "pca"])
@pytest.mark.parametrize("name", CONFIGS)
def test_full_width_equals_dense(name: str, orientation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=dtype)
    expected = logits(model)
    method = SliceGPT(orientation=orientation)  # type: ignore[arg-type]
    sliced = method.slice(model, 32, RandomCalibration(), context(tmp_path))
    assert relative(logits(sliced), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_ratio_one_is_the_model_itself(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    sliced = SliceGPT().compress(model, None, Budget(ratio=1), RandomCalibration(), context(tmp_path))  # type: ignore[arg-type]
    assert sliced is model


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_orientation_does_not_change_the_function(name: str, tmp_path: Path) -> None:
    by_pca = SliceGPT(orientation="pca").slice(tiny_model(name), 24, RandomCalibration(), context(tmp_path))
    by_chance = SliceGPT(orientation="random").slice(tiny_model(name), 24, RandomCalibration(), context(tmp_path, 5))
    assert relative(logits(by_chance), logits(by_pca)) < 1e-9


@pytest.mark.parametrize("name", ["llama-gqa", "phi", "opt"])
def test_slicing_a_planted_subspace_is_lossless(name: str, tmp_path: Path) -> None:
    """Embeddings and everything written to the stream live in 15 dimensions; a LayerNorm's mean may cost one more."""
    model = tiny_model(name)
    decoder = modeling.Decoder(model)
    basis = torch.linalg.qr(torch.randn(32, 15, dtype=torch.float64))[0]
    projector = basis @ basis.T
    with torch.no_grad():
        for table in decoder.embeddings:
            table.weight.copy_(table.weight @ projector)
        for layer in decoder.layers:
            for writer in (layer.attention_output, layer.mlp_output):
                writer.weight.copy_(projector @ writer.weight)
                if writer.bias is not None:
                    writer.bias.copy_(projector @ writer.bias)
    expected = logits(model)
    assert relative(logits(SliceGPT().slice(model, 16, RandomCalibration(), context(tmp_path))), expected) < 1e-8


def test_basis_is_orthonormal_and_loses_the_least_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 16, dtype=torch.float64, generator=generator) * torch.linspace(0.1, 3, 16)
    signals = Signals([x], [{}], [None], x.device)
    rows = x.flatten(0, 1)
    for orientation in (None, generator):
        slicer = Slicer(16, 6, orientation)
        Q = slicer.basis(signals)
        torch.testing.assert_close(Q.T @ Q, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-10)
        kept = Q[:, :6]
        lost = (rows - rows @ kept @ kept.T).square().sum()
        torch.testing.assert_close(lost, torch.linalg.svdvals(rows).square()[6:].sum())


def test_padding_does_not_enter_the_basis() -> None:
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 5:] = False
    changed = x.clone()
    changed[:, 5:] = 1e6
    slicer = Slicer(4, 4, None)
    Q, Q_changed = (slicer.basis(Signals([signal], [{}], [mask], x.device)) for signal in (x, changed))
    torch.testing.assert_close(Q.abs(), Q_changed.abs())


def principal(rows: torch.Tensor) -> torch.Tensor:
    """Principal components of [tokens, D] by singular value decomposition, largest first."""
    return torch.linalg.svd(rows, full_matrices=True)[2].T


def naive_slicegpt(name: str, width: int, calibration: RandomCalibration, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a sliced model without slicing anything: project the stream where a basis is cut.

    Each sub-block reads the stream projected onto the kept components of its input, and writes to a stream that was
    projected so; bases come from this very network. Independent of the rotation algebra under test.
    """
    model = tiny_model(name)
    decoder = modeling.Decoder(model)
    with torch.no_grad():
        fold_norms(decoder)
        for layer in decoder.layers:
            modeling.convert_layer(layer, 32)  # bare norms; the shortcuts stay identities
        modeling.replace_norm(model, decoder.family.final_norm, 32)
        (x, kwargs), (y, y_kwargs) = (
            next(iter(modeling.layer_calls(decoder, [Batch(rows, None)])))
            for rows in (next(calibration.batches(99)).input_ids, ids)
        )
        for block in decoder.module_list:
            halves = [lambda z, kw, block=block: block(z, **kw)]
            if not DecoderLayer(block, decoder.family).parallel:
                halves = [lambda z, kw, b=block: b.attention_half(z, **kw), lambda z, kw, b=block: b.mlp_half(z)]
            for half in halves:
                kept = principal(x.flatten(0, 1))[:, :width]
                projector = kept @ kept.T
                x, y = half(x @ projector, kwargs), half(y @ projector, y_kwargs)
        return decoder.head(decoder.final_norm(y))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_slicing_equals_projecting_the_stream(name: str, tmp_path: Path) -> None:
    calibration = RandomCalibration()
    expected = naive_slicegpt(name, 20, calibration, some_ids())
    sliced = SliceGPT().slice(tiny_model(name), 20, calibration, context(tmp_path))
    assert relative(logits(sliced), expected) < 1e-8
    assert relative(logits(tiny_model(name)), expected) > 1e-3


@pytest.mark.parametrize(
    ("samples", "message"), [(0, "0 calibration tokens"), (1, "16 calibration tokens cannot span")]
)
def test_too_little_calibration_text_is_an_error(samples: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        SliceGPT().slice(tiny_model("llama-gqa"), 24, RandomCalibration(samples=samples), context(tmp_path))


def test_the_seed_decides_the_orientation_and_nothing_else(tmp_path: Path) -> None:
    def table(seed: int) -> torch.Tensor:
        sliced = SliceGPT().slice(tiny_model("llama-gqa"), 24, RandomCalibration(), context(tmp_path, seed))
        return modeling.Decoder(sliced).embeddings[0].weight

    assert table(1).equal(table(1)) and not torch.allclose(table(1), table(2))


def test_padded_calibration_equals_the_shorter_unpadded_one(tmp_path: Path) -> None:
    whole = RandomCalibration(samples=4, window=16, padded=4)

    class Cut(RandomCalibration):
        def batches(self, size: int):
            for batch in whole.batches(size):
                yield type(batch)(batch.input_ids[:, :12], None)

    padded = SliceGPT().slice(tiny_model("llama-gqa"), 24, whole, context(tmp_path))
    plain = SliceGPT().slice(tiny_model("llama-gqa"), 24, Cut(), context(tmp_path))
    assert relative(logits(padded), logits(plain)) < 1e-9


@pytest.mark.parametrize(
    ("config", "expected"), [(OPT_125M, 147_250_880), (PHI_2, 2_391_772_160)], ids=["opt-125m", "phi-2"]
)
def test_counts_of_the_authors_repository_at_nominal_20_percent(config: dict, expected: int) -> None:
    nominal = int(0.8 * config["hidden_size"])
    width = nominal - nominal % 8
    shape = DecoderShape.from_config(config)
    assert sliced_size(shape, width)[0] == expected
    dense = tiny_config(config["model_type"], **config)
    with torch.device("meta"):
        record = {"rotated_residual": {"width": width}}
        model = AutoModelForCausalLM.from_config(compressed_config(dense, record, tie_word_embeddings=False))
    assert footprint(model).active_total == expected


@pytest.mark.parametrize(("ratio", "width"), [(0.8, 2912), (0.7, 2568), (0.6, 2208), (0.5, 1848)])
def test_widths_for_llama_2_7b(ratio: float, width: int) -> None:
    shape = DecoderShape.from_config(LLAMA_2_7B)
    assert shape.total == 6_738_415_616
    assert SliceGPT().width(shape, Budget(ratio=ratio)) == width


@pytest.mark.parametrize("basis", ["total", "block"])
@pytest.mark.parametrize("name", CONFIGS)
def test_prediction_equals_the_count_of_the_tensors(name: str, basis: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    shape = modeling.Decoder(model).shape
    budget = Budget(ratio=0.7, basis=basis, tolerance=0.5)  # type: ignore[arg-type]
    predicted = SliceGPT().predict(shape, budget)
    counted = footprint(SliceGPT().compress(model, None, budget, RandomCalibration(), context(tmp_path)))  # type: ignore[arg-type]
    assert (counted.active_total, counted.active_block) == (predicted.active_total, predicted.active_block)


@given(ratio=st.floats(0.3, 0.999), basis=st.sampled_from(["total", "block"]))
def test_every_ratio_between_the_extremes_is_reachable_and_every_hint_works(ratio: float, basis: str) -> None:
    shape = DecoderShape.from_config({**OPT_125M, "hidden_size": 192})
    SliceGPT().predict(shape, Budget(ratio=0.45 + ratio / 2, basis=basis))  # type: ignore[arg-type]
    try:
        SliceGPT().predict(shape, Budget(ratio=ratio, basis=basis, tolerance=2e-4))  # type: ignore[arg-type]
    except UserError as error:
        hints = str(error).partition("--ratios ")[2].partition(",")[0].split()
        assert 1 <= len(hints) <= 2
        for hint in hints:
            if float(hint) <= 1:
                SliceGPT().predict(shape, Budget(ratio=float(hint), basis=basis, tolerance=2e-4))  # type: ignore[arg-type]


@given(ratio=st.floats(0.3, 0.999), basis=st.sampled_from(["total", "block"]))
def test_width_is_the_largest_that_fits(ratio: float, basis: str) -> None:
    shape = DecoderShape.from_config(LLAMA_2_7B)
    budget = Budget(ratio=ratio, basis=basis)  # type: ignore[arg-type]
    width = SliceGPT().width(shape, budget)
    assert width % 8 == 0
    assert budget.achieved(*sliced_size(shape, width), shape) <= ratio + 5e-5
    assert width == 4096 or budget.achieved(*sliced_size(shape, width + 8), shape) > ratio + 5e-5


def test_unreachable_ratio_says_what_can_be_reached() -> None:
    shape = DecoderShape.from_config({**OPT_125M, "vocab_size": 500_000})
    with pytest.raises(UserError, match=r"not reachable for slicegpt.*--ratios 0\.\d+"):
        SliceGPT().predict(shape, Budget(ratio=0.2))


def test_error_grows_as_the_width_shrinks(tmp_path: Path) -> None:
    ids = next(RandomCalibration().batches(12)).input_ids
    expected = logits(tiny_model("llama-gqa"), ids)

    def error(width: int) -> float:
        sliced = SliceGPT().slice(tiny_model("llama-gqa"), width, RandomCalibration(), context(tmp_path))
        return float((logits(sliced, ids) - expected).square().mean())

    errors = [error(width) for width in (32, 24, 16, 8)]
    assert errors == sorted(errors) and math.isclose(errors[0], 0, abs_tol=1e-18)


def test_configure_parses_and_rejects() -> None:
    assert methods.configure("slicegpt", {"round_interval": "4", "orientation": "pca"}) == SliceGPT(
        round_interval=4, orientation="pca"
    )
    with pytest.raises(UserError, match="Did you mean round_interval"):
        methods.configure("slicegpt", {"round_intervall": "4"})
    with pytest.raises(UserError, match="must be of type int"):
        methods.configure("slicegpt", {"round_interval": "four"})
    with pytest.raises(UserError, match="least is 1"):
        methods.configure("slicegpt", {"round_interval": "0"})
    with pytest.raises(UserError, match="pca, random"):
        methods.configure("slicegpt", {"orientation": "sideways"})
