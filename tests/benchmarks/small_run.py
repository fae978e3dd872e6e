"""A run small enough for a test: a tiny random llama with a tokenizer of its own, and a text, both local."""

import random
from pathlib import Path

import run_all


def make_text(path: Path, lines: int = 600) -> Path:
    """Lines of made-up words, the same every time."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefgh", k=4)) for _ in range(50)]
    path.write_text("\n".join(" ".join(choose.choices(words, k=12)) for _ in range(lines)), encoding="utf-8")
    return path


def make_model(folder: Path) -> Path:
    """A random llama of four blocks with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=257, num_hidden_layers=4, max_position_embeddings=128, **sizes, **ids)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    byte_level = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    special = {"bos_token": "<end>", "eos_token": "<end>", "pad_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=byte_level, model_max_length=128, **special).save_pretrained(folder)
    return folder


def arguments(folder: Path, *more: str, out: str = "out", executor: str = "inline") -> list[str]:
    """A command line for the model and the text in `folder`: dense and shortgpt, perplexity only."""
    text = str(folder / "text.txt")
    return [
        *("--models", str(folder / "model"), "--methods", "shortgpt", "--ratios", "0.8", "--ratio-tolerance", "0.2"),
        *("--tasks", f"ppl:{text}", "--calibration", text, "--budget", "smoke", "--device", "cpu"),
        *("--out", str(folder / out), "--executor", executor, *more),
    ]


def run(folder: Path, *more: str, out: str = "out") -> int:
    """Run it in this process; the exit status."""
    return run_all.main(arguments(folder, *more, out=out))
