"""The shared-prefix evaluator gives the answers of stock lm-eval, whatever the model is made of."""

import random
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from benchmarks import prefix_lm, prefix_trees
from benchmarks.prefix_lm import PrefixLM
from benchmarks.progress import Tracker
from methods import modeling
from methods.base import Silent
from methods.errors import UserError
from tests.methods import test_gathered_linears
from tests.methods.recovery import made_of
from tests.methods.recovery.made_of import STRUCTURES
from tests.methods.test_delta import chosen
from tests.methods.tiny import CONFIGS, ONE_PER_FAMILY, tiny_model

# numpy scalars in lm-eval's own aggregation and libraries it imports are not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
WINDOW = 64


@pytest.fixture(scope="module")
def tokenizer(inputs) -> Any:
    return AutoTokenizer.from_pretrained(inputs / "model")


def stock(model, tokenizer, batch_size=4, **options):
    """Stock lm-eval; its own default, a log-softmax in fp32, is the less exact of the two."""
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        **{"max_length": WINDOW, "softmax_dtype": "float64"} | options,
    )


def ours(model, tokenizer, batch_size=4, progress=None):
    return PrefixLM(model, tokenizer, batch_size, progress or Silent(), "task")


def requests(count=24, seed=0, vocabulary=96):
    """Questions after the same examples, after none, after an empty context, longer than the window; 1 to 4 choices of
    1 to 6 tokens, some beginning alike, one of which may be the beginning of another."""
    draw = random.Random(seed)

    def tokens(low, high):
        return [draw.randrange(2, vocabulary) for _ in range(draw.randint(low, high))]

    found, examples = [], tokens(30, 30)
    for _ in range(count):
        context = draw.choice([[*examples, *tokens(1, 9)], tokens(1, 25), tokens(WINDOW - 4, WINDOW + 20), [0]])
        choices = [tokens(1, 6) for _ in range(draw.randint(1, 4))]
        choices += [[*choices[0], *tokens(1, 2)], [7], [8]]
        found += [(("context", "choice"), context, choice) for choice in choices]
    return found


def assert_same_answers(model, tokenizer, asked=None, **options):
    asked = asked or requests()
    expected = stock(model, tokenizer, **options)._loglikelihood_tokens(asked, disable_tqdm=True)
    found = ours(model, tokenizer)._loglikelihood_tokens(asked)
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], abs=1e-4)
    assert [answer[1] for answer in found] == [answer[1] for answer in expected]


@pytest.fixture(params=[256, 12], ids=["wide rows", "narrow rows"])
def row(request, monkeypatch):
    """Rows that take everything at once, and such that prefixes are cached."""
    monkeypatch.setattr(prefix_trees, "ROW", request.param)


@pytest.mark.usefixtures("row")
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_of_every_family(name, tokenizer):
    assert_same_answers(tiny_model(name, dtype=torch.float32), tokenizer)


@pytest.mark.usefixtures("row")
@pytest.mark.parametrize("name", ["llama-gqa", "phi", "opt"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_answers_of_every_structure(structure, name, tokenizer, tmp_path):
    assert_same_answers(STRUCTURES[structure](name, tmp_path).eval(), tokenizer)


@pytest.mark.usefixtures("row")
@pytest.mark.parametrize("method", ["cmoe", "llama-moe-v2", "magnitude", "modegpt"])
def test_answers_of_methods_that_make_others(method, tokenizer):
    model = chosen(method, "llama-gqa", 0.5 if method == "magnitude" else 0.8)
    assert_same_answers(model.eval(), tokenizer)


@pytest.mark.usefixtures("row")
def test_answers_with_a_compact_cache(tokenizer, tmp_path):
    model = STRUCTURES["experts_and_chosen_values"]("llama-gqa", tmp_path).eval()
    modeling.set_value_cache(model, "compact")
    assert_same_answers(model, tokenizer)


@pytest.mark.usefixtures("row")
@pytest.mark.parametrize("seed", range(5))
def test_answers_to_other_questions(seed, tokenizer):
    assert_same_answers(tiny_model("llama-gqa", dtype=torch.float32), tokenizer, requests(60, seed))


@pytest.mark.usefixtures("row")
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_answers_with_eager_attention(name, tokenizer):
    model = tiny_model(name, dtype=torch.float32)
    model.set_attn_implementation("eager")
    assert_same_answers(model, tokenizer)


@pytest.mark.usefixtures("row")
def test_answers_of_a_half_precision_model_are_those_of_its_logits(tokenizer):
    model = tiny_model("llama-gqa", dtype=torch.bfloat16)
    exact = [answer for answer, _ in ours(model.float(), tokenizer)._loglikelihood_tokens(requests())]
    found = [answer for answer, _ in ours(model.bfloat16(), tokenizer)._loglikelihood_tokens(requests())]
    assert found == pytest.approx(exact, rel=0.05, abs=0.2)


def test_a_sliding_window_is_left_to_stock(tokenizer):
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    model = tiny_model("qwen2", dtype=torch.float32, **changes)
    assert not prefix_lm.shares(model)
    assert_same_answers(model, tokenizer)


def test_longrope_is_left_to_stock(tokenizer):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    rope |= {"original_max_position_embeddings": 32, "factor": 2.0}
    model = tiny_model("llama-gqa", dtype=torch.float32, rope_parameters=rope)
    assert not prefix_lm.shares(model)
    assert_same_answers(model, tokenizer)


def test_the_side_of_padding_does_not_matter(tokenizer, inputs):
    left = AutoTokenizer.from_pretrained(inputs / "model", padding_side="left")
    model = tiny_model("llama-gqa", dtype=torch.float32)
    answers = [ours(model, each)._loglikelihood_tokens(requests()) for each in (tokenizer, left)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_answers_written_in_a_padded_batch_are_those_written_alone(structure, tokenizer, tmp_path):
    """lm-eval pads what it generates from at the left."""
    model = STRUCTURES[structure]("llama-gqa", tmp_path).eval()
    model.resize_token_embeddings(257)
    texts = ["a", "a longer one", "the longest of all three"]
    rules = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, rules), number) for number, text in enumerate(texts)]
    together, alone = (ours(model, tokenizer, size).generate_until(asked, disable_tqdm=True) for size in (3, 1))
    assert together == alone


def test_text_is_cut_into_tokens_as_stock_does(tokenizer):
    model = tiny_model("llama-gqa", dtype=torch.float32, vocab_size=257)
    pairs = [("", " so"), ("Is it? ", "yes"), ("Is it?", " no"), ("Is it?", " "), ("", "a")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found, expected = ours(model, tokenizer).loglikelihood(asked), stock(model, tokenizer).loglikelihood(asked)
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], abs=1e-4)


def test_rolling_windows_are_scored_as_stock_does(tokenizer):
    model = tiny_model("llama-gqa", dtype=torch.float32, vocab_size=257)
    asked = [
        Instance(
            "loglikelihood_rolling",
            {},
            ("A text of many windows, no two of them alike: " + "".join(map(str, range(90))),),
            0,
        )
    ]
    found = ours(model, tokenizer).loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(stock(model, tokenizer).loglikelihood_rolling(asked, disable_tqdm=True), abs=1e-3)


def test_requests_that_divide_the_same_tokens_elsewhere_are_told_apart(tokenizer):
    """Stock lm-eval looks the shorter continuation up at the wrong positions, unless its `logits_cache` is off."""
    model, tokens = tiny_model("llama-gqa", dtype=torch.float32), list(range(5, 35))
    asked = [(("", ""), tokens[:cut], tokens[cut:]) for cut in (20, 10, 25)]
    assert_same_answers(model, tokenizer, asked, batch_size=1, logits_cache=False)


def test_a_shared_context_is_read_once(tokenizer):
    model = tiny_model("llama-gqa", dtype=torch.float32, max_position_embeddings=2048)
    read = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, ids, output: read.append(ids[0].numel()))
    context = [2 + number % 90 for number in range(500)]
    asked = [(("context", "choice"), context, [choice, choice + 1]) for choice in (10, 20, 30, 40)]
    ours(model, tokenizer)._loglikelihood_tokens(asked)
    hook.remove()
    assert sum(read) == 500 + 4


def test_the_head_sees_only_what_is_scored(tokenizer):
    model = tiny_model("llama-gqa", dtype=torch.float32)
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, hidden, output: seen.append(hidden[0].shape[:2]))
    asked = [(("context", "choice"), [5, 6, 7, 8, 9], [10, 11]), (("context", "choice"), [5, 6, 7, 8, 9], [12, 13])]
    ours(model, tokenizer)._loglikelihood_tokens(asked)
    hook.remove()
    assert seen == [(1, 3)]  # the end of the context, 10 and 12


def test_requests_that_the_model_has_no_room_for_are_counted(tokenizer):
    lm = ours(tiny_model("llama-gqa", dtype=torch.float32), tokenizer)
    lm._loglikelihood_tokens([(("", ""), [3] * length, [4, 5]) for length in (62, 63, 64, 80)])
    assert (lm.requests, lm.truncated) == (4, 2)


@pytest.mark.parametrize(
    ("before", "answer", "message"),
    [
        ([3], [], "task: the answer 'yes' has no token"),
        ([], [4], "task: what stands before the answer 'yes' has no token"),
    ],
)
def test_a_request_without_tokens_is_named(before, answer, message, tokenizer):
    lm = ours(tiny_model("llama-gqa", dtype=torch.float32), tokenizer)
    with pytest.raises(UserError, match=message):
        lm._loglikelihood_tokens([*requests(2), (("so", "yes"), before, answer)])


def test_a_choice_longer_than_the_window_is_named(tokenizer):
    lm = ours(tiny_model("llama-gqa", dtype=torch.float32), tokenizer)
    assert len(lm._loglikelihood_tokens([(("", ""), [3], [4] * WINDOW)])) == 1
    with pytest.raises(UserError, match="task has an answer of 65 tokens, and the model's window of 64 has no room"):
        lm._loglikelihood_tokens([(("", ""), [3], [4]), (("", ""), [3], [4] * (WINDOW + 1))])


def test_what_is_to_be_written_must_leave_room_for_a_prompt(tokenizer):
    lm = ours(tiny_model("llama-gqa", dtype=torch.float32, vocab_size=257), tokenizer)
    for tokens in (None, WINDOW):  # lm-eval's own default is 256
        rules = {"until": ["x"]} | ({"max_gen_toks": tokens} if tokens else {})
        with pytest.raises(UserError, match="has no room for it"):
            lm.generate_until([Instance("generate_until", {}, ("a", rules), 0)])
    assert lm.generate_until([Instance("generate_until", {}, ("a", rules | {"max_gen_toks": WINDOW - 1}), 0)])


def test_progress_reaches_its_end(tokenizer):
    events = []
    lm = ours(tiny_model("llama-gqa", dtype=torch.float32), tokenizer, 1, Tracker(events.append))
    lm._loglikelihood_tokens(requests(80))
    assert events[-1].finished and events[-1].done == events[-1].total > 2


def test_batches_stay_within_their_budget():
    from benchmarks.prefix_lm import TOKENS_PER_SEQUENCE, batches, prompts_of
    from benchmarks.prefix_trees import groups

    found = groups(prompts_of(requests(200), WINDOW)[0])
    for batch in batches(found, 1):
        for step in batch.steps:
            largest = max(row.size for _, row in step)
            assert len(step) == 1 or len(step) * largest <= TOKENS_PER_SEQUENCE
        longest = max(map(len, batch.prefixes), default=0)
        assert len(batch.prefixes) < 2 or len(batch.prefixes) * longest <= TOKENS_PER_SEQUENCE


def tasks_of(names):
    """lm-eval's task objects: the embedded task, and stock ones whose data is there."""
    from benchmarks import harness, models
    from benchmarks.presets import PRESETS
    from benchmarks.tasks import check, expand

    found = {}
    for task in expand(names, models.resolve("llama2-7b"), PRESETS["smoke"]):
        try:
            check(task, offline=True)
        except UserError as error:
            pytest.skip(str(error))
        found |= harness.load(task)["tasks"]
    return found


@pytest.mark.parametrize("structure", ["dense", *STRUCTURES])
@pytest.mark.parametrize("name", ["wikileads_mc", "arc_challenge@5shot", "piqa", "boolq"])
def test_every_document_is_answered_as_by_stock(name, structure, tokenizer, tmp_path, monkeypatch):
    from lm_eval.evaluator import evaluate

    small = {"dtype": torch.float32, "vocab_size": 257, "max_position_embeddings": 2048}
    for place in (made_of, test_gathered_linears):
        monkeypatch.setattr(place, "tiny_model", lambda name, **_: tiny_model(name, **small))
    build = STRUCTURES.get(structure, lambda name, scratch: made_of.fresh(name))
    model = build("llama-gqa", tmp_path).eval()
    answers = []
    for lm in (ours(model, tokenizer), stock(model, tokenizer, max_length=2048)):
        results: Any = evaluate(lm, {"tasks": tasks_of([name]), "groups": {}}, limit=6)
        ((_, samples),) = results["samples"].items()
        answers.append([(each["doc_hash"], [each[metric] for metric in each["metrics"]]) for each in samples])
    assert answers[0] == answers[1] and len(answers[0]) == 6
