"""A small Llama trained from scratch: ``python -m bench.files.scratch_model DATA.jsonl … -o FOLDER [--minutes 10]``.

Its weights have never been in fewer than 32 bits, so questions about quantization can be asked of it: SmolLM2, which
the other scripts use, comes from a 4-bit file. Four layers, 256 wide, feed-forward 768 (256 divides both, so no GGUF
type falls back to another), 4,096 byte-level tokens, tied embeddings: 4.5 M weights. Rows are texts (``text``) or chats
(``messages``), read as plain text. AdamW, steps of 4 rows of 256 tokens; the rate rises for 2% of the time and falls
linearly to nothing. It knows little: what it is good for is a comparison of itself with itself.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
WINDOW, ROWS, RATE = 256, 4, 2e-3


def rows_of(path: Path) -> Iterator[str]:
    """The texts of a file of texts or chats, one JSON object a line."""
    for line in path.read_text().splitlines():
        row = json.loads(line)
        yield row["text"] if "text" in row else "\n".join(turn["content"] for turn in row["messages"])


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(texts, vocab_size=4096, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, bos_token=END, eos_token=END)


def small_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, seconds: float) -> tuple[int, float]:
    """Windows drawn at random until the time is up: steps, and the mean loss of the last 50."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    start, losses = time.monotonic(), []
    while (share := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(share / 0.02, (1 - share) / 0.98)
        begins = torch.randint(len(tokens) - WINDOW, (ROWS,)).tolist()
        batch = torch.stack([tokens[begin : begin + WINDOW] for begin in begins])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(f"{share:.0%} of the time, {len(losses)} steps, loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    return len(losses), sum(losses[-50:]) / len(losses[-50:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    texts = [text for path in given.data for text in rows_of(path)]
    tokenizer = train_tokenizer(texts)
    tokens = torch.tensor([token for text in texts for token in [0, *tokenizer.encode(text)]])
    model = small_llama()
    n_steps, loss = train(model, tokens, 60 * given.minutes)
    model.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    print(
        f"{model.num_parameters() / 1e6:.2f} M weights, {len(tokens):,} tokens, {n_steps} steps "
        f"({n_steps * ROWS * WINDOW / len(tokens):.1f} passes), loss {loss:.3f}, perplexity {math.exp(loss):.1f}"
    )


if __name__ == "__main__":
    main()
