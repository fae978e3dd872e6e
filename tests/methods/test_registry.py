"""Registry, budget and the promise that planning needs no torch."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import methods
from methods import registry
from methods.base import Budget, Method, Prediction
from methods.errors import UserError
from methods.modeling.shape import DecoderShape
from tests.methods.test_slicegpt import LLAMA_2_7B

REPOSITORY = Path(__file__).parents[2]
SHAPE = DecoderShape.from_config(LLAMA_2_7B)
THIRD_PARTY = """
from dataclasses import dataclass
from methods.base import Method
from methods.registry import register

@register("halve", title="Halve", reference="https://example.org", family="width")
@dataclass(frozen=True, kw_only=True)
class Halve(Method):
    strength: float = 0.5
    limit: int | None = None
    def compress(self, model, tokenizer, budget, calibration, context):
        return model
"""


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registrations and the entry-point cache do not outlive a test."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry._third_party.cache_clear()
    yield
    registry._third_party.cache_clear()


def install(folder: Path, entry: str, module: str = THIRD_PARTY) -> None:
    """What pip would put on the path for a third-party package with one entry point."""
    (folder / "halver.py").write_text(module)
    (folder / "halver-1.0.dist-info").mkdir()
    (folder / "halver-1.0.dist-info" / "METADATA").write_text("Name: halver\nVersion: 1.0\n")
    (folder / "halver-1.0.dist-info" / "entry_points.txt").write_text(f"[tomoe_bench.methods]\n{entry}\n")


def test_built_in_methods_have_names_titles_and_references() -> None:
    assert methods.names()[0] == "dense" and {"shortgpt", "slicegpt"} < set(methods.names())
    for name in methods.names()[1:]:
        method = methods.get(name)
        assert issubclass(method, Method) and method.name == name and method.title
        assert method.reference.startswith(("https://arxiv.org/abs/", "https://github.com/"))
        assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_unknown_method_suggests_the_near_miss() -> None:
    with pytest.raises(UserError, match="unknown method 'slicegtp'. Did you mean slicegpt.*--list methods"):
        methods.get("slicegtp")


def test_third_party_methods_are_found_through_their_entry_point(
    clean_registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "halve = halver:Halve")
    monkeypatch.syspath_prepend(tmp_path)
    assert methods.names()[-1] == "halve"
    configured = methods.configure("halve", {"strength": "0.25", "limit": "3"})
    assert configured.limit == 3 and methods.configure("halve", {"limit": "none"}).limit is None  # type: ignore[attr-defined]
    assert configured.strength == 0.25 and configured.predict(SHAPE, Budget(ratio=0.5)) is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("entry", "module", "message"),
    [
        ("broken = halver:Halve", "raise RuntimeError('no weights')", "does not import: RuntimeError: no weights"),
        ("other = halver:Halve", THIRD_PARTY, "must be a class decorated with @register"),
    ],
)
def test_a_bad_third_party_package_is_reported(
    clean_registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, module: str, message: str
) -> None:
    install(tmp_path, entry, module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "halver", raising=False)
    with pytest.raises(UserError, match=message):
        methods.get(entry.split()[0])


def test_registering_a_name_twice_or_a_non_method_fails(clean_registry: None) -> None:
    with pytest.raises(ValueError, match="registered already"):
        methods.register("dense", title="x", reference="", family="dense")(methods.get("dense"))
    with pytest.raises(ValueError, match="family 'bananas' of twice must be one of dense, depth"):
        methods.register("twice", title="x", reference="", family="bananas")(methods.get("dense"))
    thawed = dataclasses.dataclass(type("Thawed", (methods.get("dense").__base__,), {"compress": None}))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a Method and a frozen"):
        methods.register("thawed", title="x", reference="", family="dense")(thawed)
    with pytest.raises(TypeError, match="must be a Method"):
        methods.register("object", title="x", reference="", family="dense")(object)  # type: ignore[type-var]


def test_importing_and_predicting_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, methods; from methods.base import Budget; from methods.modeling.shape import DecoderShape\n"
        f"shape = DecoderShape.from_config({LLAMA_2_7B!r})\n"
        "budget = Budget(ratio=0.6, tolerance=0.1)\n"  # of 2:4 there is one size
        "for name in methods.names()[1:]: methods.configure(name, {}).predict(shape, budget)\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("ratio", [0, -0.5, 1.0001, float("nan"), 50])
def test_ratio_outside_its_range(ratio: float) -> None:
    with pytest.raises(UserError, match=r"outside \(0, 1\]"):
        Budget(ratio=ratio)


@given(ratio=st.floats(0.01, 1), achieved=st.floats(0, 1.2), step=st.floats(0, 0.2))
def test_tolerance_is_a_hundredth_or_one_grid_step_unless_given(ratio: float, achieved: float, step: float) -> None:
    gap = abs(ratio - achieved)
    assert Budget(ratio=ratio).accepts(achieved, step) == (gap <= max(0.01, step) + 1e-12)
    assert Budget(ratio=ratio, tolerance=0.05).accepts(achieved, step) == (gap <= 0.05 + 1e-12)


def test_basis_decides_what_is_counted() -> None:
    half_of_the_blocks = Prediction(active_total=SHAPE.total - SHAPE.block // 2, active_block=SHAPE.block // 2)
    counts = half_of_the_blocks.active_total, half_of_the_blocks.active_block
    assert Budget(ratio=0.5, basis="block").achieved(*counts, SHAPE) == pytest.approx(0.5)
    assert Budget(ratio=0.5).achieved(*counts, SHAPE) == pytest.approx(1 - 0.961 / 2, abs=1e-3)


def test_dense_is_ratio_one_only() -> None:
    assert methods.get("dense")().predict(SHAPE, Budget(ratio=1)).active_total == SHAPE.total  # type: ignore[union-attr]
    with pytest.raises(UserError, match="dense has ratio 1"):
        methods.get("dense")().predict(SHAPE, Budget(ratio=0.5))


def test_a_preset_is_a_starting_point() -> None:
    paper = registry.configure("tomoe", {"preset": "paper", "beta": "0"})
    assert (paper.embedding, paper.mask_noise, paper.beta, paper.alpha) == (128, "per_token", 0.0, 16.0)  # type: ignore[attr-defined]
    assert registry.configure("tomoe", {"preset": "default"}) == registry.configure("tomoe", {})
    assert registry.configure("tomoe", {"preset": "released"}).kd_weight == 2.0  # type: ignore[attr-defined]


def test_an_unknown_preset_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown preset of tomoe 'papr'. Did you mean paper"):
        registry.configure("tomoe", {"preset": "papr"})
    with pytest.raises(UserError, match="unknown preset of shortgpt 'paper'.*Known: default"):
        registry.configure("shortgpt", {"preset": "paper"})
