"""Check of a GGUF file before it is published: its structure, its tokens, and its answers compared with the model's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import jinja2
import jinja2.sandbox
import numpy as np
import torch
from gguf import GGUFReader

from veneer.errors import FormatError
from veneer.export.gguf.tokenizer import PROBE, probe_chat
from veneer.plain.units import size
from veneer.store.gguf.model import read_facts
from veneer.store.gguf.reader import open_gguf, value_of
from veneer.store.gguf.writer import part_paths

TEXTS = (
    "The quick brown fox, 12345 times.  Two spaces\n\n\tand a tab; it's café 日本語 🎉",
    "    def f(x):\n        return x**2  # 3.14\n",
)
N_ANSWER = 16
_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>",
}  # fmt: skip
_ADD_BOS = "tokenizer.ggml.add_bos_token"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """Findings of a check: facts of the file, line by line, and all problems."""

    facts: dict[str, str]
    problems: tuple[str, ...]


def check_file(path: Path, on_progress: Callable[[int, int], None] = lambda done, total: None) -> FileReport:
    """Read a whole file and check it: every tensor is finite, the vocabulary fits, a chat has one BOS, and turns end.

    Raises FormatError if the file is damaged or not GGUF.
    """
    facts = read_facts(path)
    readers = [open_gguf(part) for part in _parts(path)]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    problems = [*_count_problems(readers), *_values_problems(tensors, on_progress)]
    shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in tensors}
    problems += list(_vocabulary_problems(readers[0], shapes))
    lines = {
        "architecture": facts.contents.architecture,
        "tensors": ", ".join(f"{n} {kind}" for kind, n in Counter(t.tensor_type.name for t in tensors).most_common()),
        "size": size(sum(part.stat().st_size for part in _parts(path))),
        "pre-tokenizer": facts.pre_tokenizer or "none",
    }
    chat, found = _chat(readers[0])
    return FileReport(facts=lines | chat, problems=(*problems, *found))


@torch.no_grad()
def compare_answers(file: Any, model: Any, tokenizers: tuple[Any, Any]) -> FileReport:
    """Compare the model in a GGUF file, as veneer reads it, with the model that it was made from: the tokens of texts,
    and a greedy answer.

    ``tokenizers`` are the file's and the model's.
    """
    problems = []
    ours, theirs = tokenizers
    for text in TEXTS:
        cut = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (ours, theirs)]
        if cut[0] != cut[1]:
            problems.append(f"{text!r} is cut into {cut[0]}, the model's tokenizer cuts it into {cut[1]}")
    ids = theirs(PROBE[0], return_tensors="pt")["input_ids"].to(model.device)
    if theirs.chat_template is not None:
        text = theirs.apply_chat_template(probe_chat()[:1], tokenize=False, add_generation_prompt=True)
        ids = theirs(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    for _ in range(N_ANSWER):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    n_prompt = ids.shape[1] - N_ANSWER
    expected, found = (each(ids[:, :-1]).logits[0].float() for each in (model, file))
    same = int((found.argmax(-1) == expected.argmax(-1))[n_prompt - 1 :].sum())
    log_p, log_q = (logits[:, : expected.shape[1]].log_softmax(-1) for logits in (expected, found))
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    if same < N_ANSWER // 2:
        problems.append(f"only {same} of {N_ANSWER} greedy tokens are the model's (KL {kl:.3g} nats)")
    lines = {"greedy tokens": f"{same} of {N_ANSWER} are the model's", "KL to the model": f"{kl:.2g} nats a token"}
    return FileReport(facts=lines, problems=tuple(problems))


def _parts(path: Path) -> list[Path]:
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    paths = part_paths(path.with_name(f"{found[1]}.gguf"), int(found[3]))
    if missing := [part.name for part in paths if not part.is_file()]:
        raise FormatError(
            f"{path} is one part of {len(paths)}; missing: {', '.join(missing[:3])}. Fetch or write all parts"
        )
    return paths


def _count_problems(readers: Sequence[GGUFReader]) -> Iterator[str]:
    wanted, found = value_of(readers[0], "split.tensors.count"), sum(len(reader.tensors) for reader in readers)
    if wanted is not None and wanted != found:
        yield f"its parts hold {found} tensors, and say {wanted}"


def _values_problems(tensors: Sequence[Any], on_progress: Callable[[int, int], None]) -> Iterator[str]:
    for done, tensor in enumerate(tensors):
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        for start in range(0, len(rows), 1024):  # a table of embeddings as float32 would be gigabytes
            if not np.isfinite(gguf.quants.dequantize(rows[start : start + 1024], tensor.tensor_type)).all():
                yield f"{tensor.name} holds values that are not finite"
                break
        on_progress(done + 1, len(tensors))


def _vocabulary_problems(reader: GGUFReader, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    tokens = value_of(reader, "tokenizer.ggml.tokens")
    if tokens is None:
        yield "it has no vocabulary"
        return
    rows = shapes.get("token_embd.weight", (0,))[0]
    if len(tokens) != rows:
        yield f"it has {len(tokens)} tokens and {rows} rows of embeddings"
    twice = [token for token, n in Counter(tokens).items() if n > 1]
    if twice:
        yield f"the tokens {twice[:3]} occur several times"
    if value_of(reader, "tokenizer.ggml.model") == "gpt2" and value_of(reader, "tokenizer.ggml.pre") is None:
        yield "it names no pre-tokenizer: the runtime would cut words by a default"


def _chat(reader: GGUFReader) -> tuple[dict[str, str], list[str]]:
    """Return facts and problems of a rendered chat: one BOS, and turns that end with a token at which the runtime
    stops.
    """
    template = value_of(reader, "tokenizer.chat_template")
    if template is None:
        return {"chat template": "none"}, []
    tokens = value_of(reader, "tokenizer.ggml.tokens") or []

    def named(name: str) -> str:
        number = value_of(reader, f"tokenizer.ggml.{name}_token_id")
        return tokens[number] if number is not None and number < len(tokens) else ""

    bos, ends = named("bos"), {named("eos"), named("eot"), named("eom"), *(_ENDS & set(tokens))} - {""}
    try:
        text = _compiled(template).render(
            messages=probe_chat(), bos_token=bos, eos_token=named("eos"), add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError) as error:
        return {"chat template": "does not render"}, [f"its chat template does not render: {error}"]
    problems = []
    turns = text.partition(PROBE[1])[2].partition(PROBE[2])[0].lstrip()
    end = next((each for each in ends if turns.startswith(each)), None)
    if end is None:
        problems.append(f"an answer is followed by {turns[:20]!r}, at which the runtime does not stop")
    if bos and text.lstrip().startswith(bos * 2):
        problems.append(f"a rendered chat begins with two BOS ({bos})")
    return {
        "chat template": f"{len(template):,} characters",
        "end of a turn": end or "none",
        "BOS of a chat": _bos(bool(bos) and text.startswith(bos), bool(value_of(reader, _ADD_BOS))),
    }, problems


def _bos(in_template: bool, by_flag: bool) -> str:
    """Say in words where a chat's BOS comes from. If the flag adds one, llama.cpp drops the template's."""
    if in_template:
        return "in the template" + (", and by the flag: llama.cpp takes one" if by_flag else "")
    return "by the flag" if by_flag else "none"


def _compiled(template: str) -> Any:
    """Return the template as transformers and llama.cpp run it."""

    def fail(text: str) -> None:
        raise jinja2.TemplateError(text)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda form: "26 Nov 2026"}
    return environment.from_string(template)
