"""Tasks: what names and suites stand for, and lm-eval's numbers checked against ones computed by hand."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256

import pytest
import torch

from benchmarks import hub, tasks
from benchmarks.assets import AssetMissing
from benchmarks.embedded import wikileads
from benchmarks.models import Model, resolve
from benchmarks.presets import PRESETS
from benchmarks.progress import Tracker
from benchmarks.tasks import Task, check, definition, evaluate, expand
from methods.base import Silent
from methods.errors import UserError
from tests.methods.tiny import tiny_model

PAPER, SMOKE = PRESETS["paper"], PRESETS["smoke"]
HUB_MODEL, OWN_MODEL = resolve("llama2-7b"), resolve("smollm2-135m-q4")
# numpy scalars in lm-eval's own aggregation and libraries it imports are not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def named(requests, model=HUB_MODEL, settings=PAPER):
    return [task.name for task in expand(requests, model, settings)]


def test_suites_of_a_hub_model():
    texts = ["ppl-wikitext2@2048", "ppl-wikitext2@4096", "ppl-c4@2048", "ppl-c4@4096"]
    zeroshot = [f"{name}@0shot" for name in ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")]
    assert named(["ppl", "zeroshot", "speed"]) == [*texts, *zeroshot, "speed"]
    shots = {"boolq": 32, "sciq": 0, "piqa": 0, "winogrande": 5, "arc_challenge": 25, "hellaswag": 10}
    assert named(["fewshot"]) == [f"{name}@{number}shot" for name, number in shots.items()]
    assert named(["moe-v2"]) == [*named(["fewshot"]), "truthfulqa_mc2@0shot", "mmlu@5shot"]
    assert named(["mmlu"]) == ["mmlu@5shot"]
    assert set(named(["all"])) == set(named(["ppl", "zeroshot", "moe-v2", "speed"]))


def test_suites_of_a_model_that_runs_without_a_hub():
    expected = ["ppl-wikileads@512", "ppl-moby-dick@512", "wikileads_mc@0shot", "wikileads_mc@5shot", "speed"]
    assert named(["ppl", "zeroshot", "fewshot", "speed"], OWN_MODEL, SMOKE) == named(["all"], OWN_MODEL, SMOKE)
    assert named(["all"], OWN_MODEL, SMOKE) == expected
    assert named(["moe-v2", "mmlu"], OWN_MODEL, SMOKE) == ["wikileads_mc@5shot", "mmlu@5shot"]


@pytest.mark.parametrize(("limit", "windows"), [(512, [512]), (2048, [2048]), (8192, [2048, 4096])])
def test_windows_are_cut_to_the_model_s_limit(limit, windows):
    model = Model(name="m", title="m", kind="hub", location="m", published={"max_position_embeddings": limit})
    assert named(["ppl:moby-dick"], model) == [f"ppl-moby-dick@{window}" for window in windows]


def test_single_names():
    assert named(["ppl:moby-dick@256"]) == ["ppl-moby-dick@256"]
    assert named(["arc_easy@5shot", "boolq"]) == ["arc_easy@5shot", "boolq@0shot"]
    assert named(["gsm8k", "gsm8k@0shot"]) == ["gsm8k@5shot", "gsm8k@0shot"]  # lm-eval's definition says 5


def test_texts_to_offer_have_a_test_split():
    offered = {name.removeprefix("ppl:") for name in tasks.names() if name.startswith("ppl:")}
    assert offered == {"wikileads", "moby-dick", "wikitext2", "c4"}


def test_a_task_asked_for_twice_runs_once():
    assert named(["speed", "arc_easy", "speed", "arc_easy@0shot"]) == ["speed", "arc_easy@0shot"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("hellaswagg", "unknown task 'hellaswagg'. Did you mean hellaswag.*nearest: hellaswag"),
        ("zeroshots", "Did you mean zeroshot"),
        ("ai2_arc", "task or group of lm-eval works too, but none of its tags"),
        ("ppl:moby-dick@9999", r"2 to 4096 tokens. Type ppl:moby-dick@4096"),
        ("ppl:moby-dick@1", "2 to 4096 tokens"),
        ("ppl:moby-dick@0", "2 to 4096 tokens"),
    ],
)
def test_tasks_that_do_not_exist(request_, message):
    with pytest.raises(UserError, match=message):
        expand([request_], HUB_MODEL, PAPER)


def test_two_files_of_one_name_are_two_tasks(tmp_path):
    for content in "ab":
        (tmp_path / content).mkdir()
        (tmp_path / content / "my.text.txt").write_text(content)
    paths = [str(tmp_path / content / "my.text.txt") for content in "ab"]
    found = expand([f"ppl:{path}@64" for path in paths], HUB_MODEL, PAPER)
    labels = [f"my.text-{sha256(content).hexdigest()[:8]}" for content in (b"a", b"b")]
    assert found == [
        Task(name=f"ppl-{label}@64", kind="ppl", source=path, window=64)
        for label, path in zip(labels, paths, strict=True)
    ]


def test_planning_imports_neither_torch_nor_lm_eval():
    script = (
        "import sys; from benchmarks import models, tasks; from benchmarks.presets import PRESETS;"
        "planned = tasks.expand(['all'], models.resolve('llama2-7b'), PRESETS['paper']);"
        "assert not {'torch', 'lm_eval', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("folder", ["arc", "piqa", "winogrande", "mmlu"])
def test_definitions_are_those_of_lm_eval_s_own_index(folder):
    from lm_eval.tasks._index import TaskIndex

    path = tasks._stock_folder() / folder
    index = {name: entry.yaml_path for name, entry in TaskIndex.build([path]).items() if entry.yaml_path}
    assert tasks._definitions(path) == index


@pytest.mark.parametrize(
    ("group", "shots"),
    [("toys_mixed@mixedshot", (0, 2, 1)), ("toys_mixed@2shot", (2, 2, 2)), ("toys_all@mixedshot", (0, 2, 1))],
)
def test_what_is_inside_a_group_goes_by_its_shots_there(group, shots, toy, tmp_path):
    (tmp_path / "definitions" / "all.yaml").write_text("group: toys_all\ntask: [toys_mixed]")
    names = {f"{name}@{shot}shot" for name, shot in zip(("toy_zero", "toy_two", "toy_three"), shots, strict=True)}
    assert tasks.inside(group) == names | ({"toys_mixed@mixedshot"} if "all" in group else set())


def test_a_group_needs_the_data_of_all_its_members():
    assert tasks._datasets(definition("arc_easy")) == {("allenai/ai2_arc", "ARC-Easy")}
    found = tasks._datasets(definition("mmlu"))
    assert {repository for repository, _ in found} == {"cais/mmlu"}
    assert len(found) == 57


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("wikitext2/token_ppl@2048", True),
        ("wikitext/word_perplexity@0shot", True),
        ("pile_10k/bits_per_byte@0shot", True),
        ("truthfulqa/brier_score[none]@0shot", True),
        ("crows_pairs_english/likelihood_diff@0shot", True),
        ("arc_easy/truncated_requests@5shot", True),
        ("speed/weights_bytes", True),
        ("speed/cache_bytes_per_token", True),
        ("speed/peak_host_bytes@b4", True),
        ("speed/first_token_s_p99@b1", True),
        ("speed/decode_time_over_bound@b1", True),
        ("speed/decode_flops_per_token", True),
        ("speed/prefill_joules_per_token@b1", True),
        ("speed/decode_tokens_per_s_iqr@b1", True),
        ("arc_easy/acc_norm@0shot", False),
        ("arc_easy/acc_bytes@0shot", False),
        ("gsm8k/exact_match[bias]@5shot", False),
        ("perplexity/acc@0shot", False),
        ("speed/decode_tokens_per_s@b1", False),
        ("speed/decode_tokens_per_s_vs_dense@b1", False),
        ("speed/peak_flops_per_s", False),
        ("speed/largest_batch", False),
    ],
)
def test_which_metrics_are_better_when_lower(metric, lower):
    assert tasks.lower_is_better(metric) == lower


def test_data_out_of_reach_is_named_before_any_work(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    (task,) = expand(["arc_easy"], HUB_MODEL, PAPER)
    with pytest.raises(UserError, match=r"allenai/ai2_arc \(ARC-Easy\) is not whole in the local cache.*load_dataset"):
        check(task, offline=True)


@pytest.fixture(scope="module")
def tokenizer(inputs):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(inputs / "model")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa", dtype=torch.float32, vocab_size=257, max_position_embeddings=2048)


@pytest.fixture
def run(model, tokenizer, tmp_path):
    def run(task, progress=None, model=model, **settings):
        return evaluate(
            task,
            model,
            tokenizer,
            dense=None,
            settings=replace(SMOKE, **settings),
            samples_dir=tmp_path / "samples",
            progress=progress or Silent(),
        )

    return run


def continuation_log_likelihood(model, tokenizer, context, continuation):
    prompt, whole = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
    ids = torch.tensor(whole)
    with torch.no_grad():
        log_probs = model(ids[None]).logits[0].log_softmax(-1)
    return sum(float(log_probs[i - 1, ids[i]]) for i in range(len(prompt), len(whole)))


@pytest.fixture
def wikileads_mc():
    try:
        next(wikileads.articles("test"))
    except AssetMissing as error:
        pytest.skip(str(error))
    (task,) = expand(["wikileads_mc"], OWN_MODEL, SMOKE)
    check(task, offline=True)
    return task


def test_multiple_choice_is_the_sum_of_token_log_probabilities(run, wikileads_mc, model, tokenizer, tmp_path):
    from benchmarks.task_definitions.wikileads_mc import questions

    found = run(wikileads_mc, documents=3)
    samples = gzip.decompress((tmp_path / "samples" / "wikileads_mc@0shot.jsonl.gz").read_bytes()).splitlines()
    correct = []
    for question, line in zip(questions("test"), samples, strict=False):
        context = question["lead"] + "\n\nDescription:"
        scores = [continuation_log_likelihood(model, tokenizer, context, f" {each}") for each in question["choices"]]
        sample = json.loads(line)
        assert sample["log_likelihoods"] == pytest.approx(scores, rel=1e-4)
        correct.append(float(scores.index(max(scores)) == question["gold"]))
        assert sample["correct"] == {"acc": correct[-1]}
    metric = found.metrics["wikileads_mc/acc@0shot"]
    assert (metric.value, metric.n) == (sum(correct) / 3, 3)
    expected = torch.tensor(correct).std() / 3**0.5
    assert metric.stderr == pytest.approx(float(expected), rel=1e-5)
    assert found.dataset_revisions == {"wikileads_mc": "0.0.7"}
    assert found.task_versions == {"wikileads_mc@0shot": "1.0"}


def test_samples_are_the_same_bytes_every_time(run, toy, tmp_path):
    file = tmp_path / "samples" / "toy_zero@0shot.jsonl.gz"
    first, again = (run(toy("toy_zero")) and file.read_bytes() for _ in range(2))
    assert first == again
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_batches_change_no_answer(run, toy):
    one, many = (run(toy("toy_zero"), batch_size=size).metrics for size in (1, 5))
    assert one == many


def test_progress_reaches_its_end(run, toy):
    events = []
    run(toy("toy_zero"), Tracker(events.append), documents=4, batch_size=1)
    assert events[-1].finished
    assert events[-1].done == events[-1].total == 1  # the questions begin alike and fill one row


@pytest.mark.parametrize(
    ("request_", "task", "metrics"),
    [
        ("toy_two", "toy_two@2shot", {"toy_two/acc@2shot"}),
        ("toy_two@0shot", "toy_two@0shot", {"toy_two/acc@0shot"}),
        ("toys_same", "toys_same@2shot", {"toy_two/acc@2shot", "toy_three/acc@2shot"}),
        (
            "toys_mixed",
            "toys_mixed@mixedshot",
            {"toy_zero/acc@0shot", "toy_two/acc@2shot", "toy_three/acc@1shot", "toys_mixed/acc@mixedshot"},
        ),
        (
            "toys_mixed@1shot",
            "toys_mixed@1shot",
            {f"{name}/acc@1shot" for name in ("toy_zero", "toy_two", "toy_three", "toys_mixed")},
        ),
    ],
)
def test_every_member_of_a_group_has_its_own_shots_unless_asked(run, toy, tmp_path, request_, task, metrics):
    asked = toy(request_)
    assert asked.name == task
    found = run(asked, documents=2)
    assert set(found.metrics) - {name.replace("/acc@", "/acc_norm@") for name in metrics} == metrics
    samples = {path.name.removesuffix(".jsonl.gz") for path in (tmp_path / "samples").iterdir()}
    assert samples == {name.replace("/acc", "") for name in metrics if not name.startswith("toys")}
    assert samples <= set(found.task_versions)


@pytest.mark.parametrize(("name", "expected"), [("toy_zero", 3), ("toy_written", 2)])
def test_requests_that_the_model_has_no_room_for_are_counted(run, toy, name, expected):
    # Questions have 9, 18, ... 54 letters, each a token. Of " yes" and " no" all but the last token is fed too;
    # writing takes up to 5 tokens. One of 45 letters fits a room of 47 with " no" only.
    small = tiny_model("llama-gqa", dtype=torch.float32, vocab_size=257, max_position_embeddings=47)
    metrics = run(toy(name), model=small).metrics
    assert metrics[f"{name}/truncated_requests@0shot"].value == expected
    assert metrics[f"{name}/truncated_requests@0shot"].n == (12 if name == "toy_zero" else 6)
    assert f"{name}/truncated_requests@0shot" not in run(toy(name)).metrics


def test_solved_examples_a_task_does_not_allow_are_an_error(run, monkeypatch):
    from lm_eval.tasks import TaskManager

    class Fixed:
        task_name = "fixed"

        def get_config(self, key):
            return 0

    monkeypatch.setattr(TaskManager, "load", lambda self, names: {"tasks": {"fixed": Fixed()}, "groups": {}})
    with pytest.raises(UserError, match="fixes fixed at zero shots.*arc_easy@0shot"):
        run(Task(name="arc_easy@5shot", kind="lm_eval", source="arc_easy", shots=5, forced=True))


def test_stock_tasks_run_under_their_stock_names(run, tmp_path):
    requests = expand(["arc_easy@2shot", "piqa"], HUB_MODEL, SMOKE)
    for task in requests:
        try:
            check(task, offline=True)
        except UserError as error:
            pytest.skip(str(error))
    metrics = [run(task, documents=3).metrics for task in requests]
    assert set(metrics[0]) == {"arc_easy/acc@2shot", "arc_easy/acc_norm@2shot"}
    assert set(metrics[1]) == {"piqa/acc@0shot", "piqa/acc_norm@0shot"}
    assert {metric.n for found in metrics for metric in found.values()} == {3}


def test_perplexity_of_a_local_text(run, inputs):
    (task,) = expand([f"ppl:{inputs / 'text.txt'}@64"], HUB_MODEL, SMOKE)
    found = run(task)
    label = f"text-{sha256((inputs / 'text.txt').read_bytes()).hexdigest()[:8]}"
    assert set(found.metrics) == {f"{label}/token_ppl@64"}
    assert found.metrics[f"{label}/token_ppl@64"].n == SMOKE.ppl_windows
    assert set(found.dataset_revisions) == {label}
    assert set(found.task_versions) == {f"ppl-{label}@64"}


def test_speed_is_measured_too(run):
    found = run(Task(name="speed", kind="speed"))
    assert "speed/decode_tokens_per_s@b1" in found.metrics and set(found.task_versions) == {"speed"}


def test_hub_is_asked_only_when_allowed(monkeypatch):
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_ask", lambda *arguments: asked.append(arguments[0]))
    hub.check_dataset("org/nowhere", "default", offline=False)
    assert asked == ["org/nowhere"]
