"""Definitions of tasks small enough for a test: six questions of 9 to 54 letters, and groups of them."""

from pathlib import Path

TOY = """
custom_dataset: !function toy.dataset
fewshot_split: train
test_split: test
doc_to_text: "{{question}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: ["yes", "no"]
doc_to_target: 0
"""
DEFINITIONS = {
    "toy.py": """
from datasets import Dataset

def dataset(**metadata):
    questions = [{"question": "Is it so?" * (1 + number)} for number in range(6)]
    return {"train": Dataset.from_list(questions), "test": Dataset.from_list(questions)}
""",
    "zero.yaml": f"task: toy_zero\n{TOY}{CHOICE}",
    "two.yaml": f"task: toy_two\nnum_fewshot: 2\n{TOY}{CHOICE}",
    "three.yaml": f"task: toy_three\nnum_fewshot: 2\n{TOY}{CHOICE}",
    "written.yaml": f"""
task: toy_written
{TOY}
output_type: generate_until
doc_to_target: so
generation_kwargs: {{until: [x], max_gen_toks: 5}}
""",
    "filtered.yaml": f"""
task: toy_filtered
{TOY}
output_type: generate_until
doc_to_target: so
generation_kwargs: {{until: [x], max_gen_toks: 5}}
filter_list:
  - {{name: first, filter: [{{function: take_first}}]}}
  - {{name: lower, filter: [{{function: lowercase}}, {{function: take_first}}]}}
""",
    "rolling.yaml": f"""
task: toy_rolling
{TOY}
output_type: loglikelihood_rolling
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
""",
    "same.yaml": "group: toys_same\ntask: [toy_two, {task: toy_three}]",
    "mixed.yaml": """
group: toys_mixed
task: [toy_zero, toy_two, {task: toy_three, num_fewshot: 1}]
aggregate_metric_list: [{metric: acc, aggregation: mean}]
""",
}


def write(folder: Path) -> Path:
    """The definitions as files."""
    folder.mkdir()
    for name, content in DEFINITIONS.items():
        (folder / name).write_text(content)
    return folder
