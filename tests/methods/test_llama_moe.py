"""LLaMA-MoE v1 and v2: splits, gates and scales against the papers' statements."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import methods
from methods import experts, modeling
from methods.base import Budget, Context
from methods.errors import UserError
from methods.expert_plans import Structure
from methods.llama_moe import LLaMAMoE, text_kinds
from methods.llama_moe_v2 import LLaMAMoEv2, residual_split
from methods.modeling.structures.moe_mlp import MoEMLP, mixtures
from tests.methods.tiny import RandomCalibration, tiny_model

CALIBRATION = RandomCalibration(samples=20, padded=2)


def converted(method: str, name: str, tmp_path: Path, context: Context | None = None, **settings: str) -> list[MoEMLP]:
    budget = Budget(ratio=0.8, basis="block", tolerance=1)
    made = methods.configure(method, settings).compress(
        tiny_model(name),
        None,  # type: ignore[arg-type]
        budget,
        CALIBRATION,
        context or Context(scratch=tmp_path),
    )
    return [moe for moe in mixtures(made) if moe is not None]


def members(moe: MoEMLP) -> list[list[int]]:
    return [moe.neurons[positions.long()].tolist() for positions in moe.sets]


@pytest.mark.parametrize(("active", "experts"), [(4, 16), (2, 16), (2, 8)])
def test_a_gate_of_zeros_weighs_every_expert_alike(active: int, experts: int, tmp_path: Path) -> None:
    """N / k^2 each: 1 for 4/16, 4 for 2/16, 2 for 2/8."""
    moes = converted("llama-moe", "opt", tmp_path, router="linear", experts=f"A{active}E{experts}")
    choice = moes[0].choose(moes[0].router(torch.randn(5, 32, dtype=torch.float64)))
    assert choice.weights_Tk is not None
    torch.testing.assert_close(choice.weights_Tk, torch.full((5, active), experts / active**2, dtype=torch.float64))
    assert choice.experts_Tk.tolist() == [list(range(active))] * 5


def test_weights_add_up_to_the_scale(tmp_path: Path) -> None:
    for settings, scale in (({}, 2.0), ({"scale": "1.5"}, 1.5)):
        for moe in converted("llama-moe", "phi", tmp_path, experts="A4E8", **settings):
            weights = moe.choose(moe.router(torch.randn(9, 32, dtype=torch.float64))).weights_Tk
            assert weights is not None
            torch.testing.assert_close(weights.sum(1), torch.full((9,), scale, dtype=torch.float64))


def test_the_drawn_gate_is_bounded_as_torch_draws_linear_layers(tmp_path: Path) -> None:
    (moe, *_) = converted("llama-moe", "phi", tmp_path, experts="A4E8")
    for name, size in (("inner", 32), ("outer", 8)):
        weight = moe.router.get_parameter(f"{name}.weight")
        assert weight.abs().max() <= size**-0.5 and weight.std() > 0.4 * size**-0.5


def test_the_linear_split_is_of_up_rows(tmp_path: Path) -> None:
    dense = modeling.Decoder(tiny_model("llama-gqa")).layers
    for layer, moe in zip(dense, converted("llama-moe", "llama-gqa", tmp_path, split="clustering"), strict=True):
        up = torch.nn.functional.normalize(layer.mlp_inputs[1].weight.detach().float())
        expected = experts.balanced_parts(up, [len(own) for own in moe.sets], 0)
        assert members(moe) == [part.tolist() for part in expected]


def kinds_by_hand(model: Any, groups: int) -> Tensor:
    texts = experts.windows(CALIBRATION, Context(scratch=Path()), 1024)
    return text_kinds(modeling.Decoder(model).embeddings[0].weight.detach(), texts, groups, 0)


@pytest.mark.parametrize("split", ["gradient", "sharing"])
def test_splits_by_gradient(split: str, tmp_path: Path) -> None:
    """From importances measured here with kinds computed here."""
    model = tiny_model("llama-gqa")
    kinds = kinds_by_hand(model, 6)
    assert sorted(kinds.bincount().tolist()) == [3, 3, 3, 3, 4, 4]
    texts = experts.windows(CALIBRATION, Context(scratch=tmp_path), 1024)
    scores, _ = experts.neuron_importance(
        model,
        modeling.Decoder(model).layers,
        texts,
        lambda place, number, x_TD: kinds[number].expand(len(x_TD)),
        6,
        Context(scratch=tmp_path),
    )
    context = Context(scratch=tmp_path)
    moes = converted("llama-moe", "llama-gqa", tmp_path, context, split=split, experts="A3E6")
    for moe, scores_NF in zip(moes, scores, strict=True):
        if split == "sharing":
            expected = [sorted(row.argsort(descending=True)[:8].tolist()) for row in scores_NF]
        else:
            expected = [part.tolist() for part in experts.greedy_parts(scores_NF, torch.arange(48), [8] * 6)]
        assert members(moe) == expected
    if split == "sharing":
        gone = 1 - sum(moe.layout.neurons for moe in moes) / (48 * 4)
        assert 0 < gone < 1 and f"{gone:.1%} of the MLP neurons" in context.notes[0]


def test_as_many_overlapping_experts_as_come_nearest_to_disjoint_ones(tmp_path: Path) -> None:
    """Two blocks of 24 neurons in six experts; those of the first have 24 together, of the second 8: 16 on average."""
    wide, narrow = [*torch.arange(24).split(4)], [torch.arange(start, start + 4) for start in (0, 1, 2, 3, 4, 4)]
    for active, nearest, note in ((2, 2, 0), (3, 4, 0), (4, 6, 0), (5, 6, 1)):
        context, asked = Context(scratch=tmp_path), Structure(0, active, 6)
        solved = LLaMAMoE(split="sharing").solved([wide, narrow], asked, 24, context)
        assert solved == Structure(0, nearest, 6)
        assert context.notes[0] == "33.3% of the MLP neurons are among the highest of no expert, and gone"
        told = ["experts overlap: a token gets at most 66.7% of the MLP neurons, not 83.3% as asked"]
        assert context.notes[1:] == told * note
        given = LLaMAMoE(split="sharing", experts=f"A{active}E6")
        assert given.solved([wide, narrow], asked, 24, context) == asked
    (same,) = {LLaMAMoE(split="sharing").solved([narrow], Structure(0, 4, 6), 24, context)}
    assert same.active == 4  # more would be no nearer


def test_too_small_ratios_are_refused_of_overlapping_experts_too() -> None:
    shape, sharing = modeling.Decoder(tiny_model("phi")).shape, LLaMAMoE(split="sharing")
    with pytest.raises(UserError, match="0.3 is not reachable for llama-moe"):
        sharing.predict(shape, Budget(ratio=0.3, basis="block"))
    assert LLaMAMoE(split="sharing", experts="A7E8").predict(shape, Budget(ratio=0.5, basis="block")) is None


def test_too_few_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="20 windows of text.*24 experts.*split=random"):
        converted("llama-moe", "opt", tmp_path, split="gradient", experts="E24")


# --- v2 ---


def test_vanilla_is_slices(tmp_path: Path) -> None:
    for moe in converted("llama-moe-v2", "phi", tmp_path, mode="vanilla", experts="A2E8"):
        assert members(moe) == [list(range(8 * j, 8 * j + 8)) for j in range(8)]
        assert moe.layout.scale == 4.0 and moe.layout.gate == "softmax"
        assert moe.neurons.tolist() == list(range(64))


@pytest.mark.parametrize("structure", [Structure(1, 1, 8), Structure(3, 1, 7), Structure(0, 1, 4), Structure(5, 1, 6)])
def test_the_shared_part_is_what_most_experts_want(structure: Structure) -> None:
    scores = torch.rand(structure.routed, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared, parts = residual_split(scores, structure)
    sizes = structure.sizes(50)
    assert len(shared) == sum(sizes[: structure.shared]) and [len(p) for p in parts] == sizes[structure.shared :]
    assert torch.cat([shared, *parts]).sort().values.tolist() == list(range(50))
    wanted = [set(sorted(range(50), key=lambda i: -float(row[i]))[: sizes[0]]) for row in scores]
    rank = sorted(range(50), key=lambda i: (-sum(i in own for own in wanted), -float(scores[:, i].sum())))
    assert sorted(shared.tolist()) == sorted(rank[: len(shared)])
    rest = torch.tensor(sorted(rank[len(shared) :]))
    expected = experts.greedy_parts(scores, rest, sizes[structure.shared :])
    assert [part.tolist() for part in parts] == [part.tolist() for part in expected]


def test_the_published_structure_adds_one_expert_to_the_shared_part(tmp_path: Path) -> None:
    """Its weight is exactly 1: y = W_shared x + E_j x."""
    moes = converted("llama-moe-v2", "phi", tmp_path, experts="S1A1E8")
    assert len(moes) == 2
    for moe in moes:
        x = torch.randn(9, 32, dtype=torch.float64)
        choice = moe.choose(moe.router(x))
        assert moe.shared is not None and len(moe.shared) == 8 and len(moe.sets) == 7
        assert choice.weights_Tk is not None and (choice.weights_Tk == 1).all()
        with torch.no_grad():
            h = moe.union.hidden(x)
            for row, hidden, expert, y in zip(x, h, choice.experts_Tk[:, 0], moe(x), strict=True):
                assert int(expert) == int((moe.router.weight @ row).argmax())
                own = torch.cat([moe.shared, moe.sets[expert]]).long()
                torch.testing.assert_close(y, hidden[own] @ moe.union.down_wD[own] + moe.union.bias_D)


def test_centroids_are_means_of_clusters_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Tensor, Tensor]] = []
    cluster = experts.cluster

    def keep(points: Tensor, *rest: Any) -> Tensor:
        assert rest == (4, 42, 98, 0)  # 280 / 4 less and more two fifths
        made.append((points, cluster(points, *rest)))
        return made[-1][1]

    monkeypatch.setattr(methods.llama_moe_v2, "cluster", keep)
    moes = converted("llama-moe-v2", "qwen2", tmp_path, experts="S1A1E5")
    assert len(made) == len(moes) == 2
    for (points, labels), moe in zip(made, moes, strict=True):
        counts = labels.bincount(minlength=4)
        even = len(points) / 4
        assert len(points) == 20 * 14 and counts.min() >= int(0.6 * even) and counts.max() <= -(-1.4 * even // 1)
        expected = torch.stack([points[labels == j].mean(0) for j in range(4)])
        torch.testing.assert_close(moe.router.weight, expected, rtol=1e-4, atol=1e-5)


def test_separated_clusters_of_like_norms_choose_their_own_expert() -> None:
    """And where norms differ, a dot product may not: the longest centroid draws all."""
    centres = torch.eye(4, 8) * 5
    points = centres.repeat_interleave(20, 0) + 0.1 * torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    labels = experts.cluster(points, 4, 12, 28, 0)
    centroids = torch.stack([points[labels == j].mean(0) for j in range(4)])
    assert (points @ centroids.T).argmax(1).equal(labels)
    lopsided = points.clone()
    lopsided[:, 0] += 30
    far = torch.stack([lopsided[labels == j].mean(0) for j in range(4)])
    assert not (lopsided @ far.T).argmax(1).equal(labels)


def test_every_token_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[Tensor] = []
    importance = experts.neuron_importance

    def keep(*args: Any) -> Any:
        result = importance(*args)
        counts.append(result[1])
        return result

    monkeypatch.setattr(methods.llama_moe_v2, "neuron_importance", keep)
    converted("llama-moe-v2", "llama-gqa", tmp_path, experts="S1A1E5")
    assert counts[0].shape == (2, 4) and (counts[0].sum(1) == 20 * 14).all()


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="cannot tell 47 experts apart by 40 tokens.*tokens=16384, or fewer.*experts=E24"
    ):
        converted("llama-moe-v2", "llama-gqa", tmp_path, experts="S1A1E48", tokens="40")
    assert LLaMAMoEv2().tokens == 16384
