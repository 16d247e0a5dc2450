"""Several tokens a step beside one: one stream that quotes or edits its prompt, prose, 32 streams, and forced tokens.

    python -m bench.serving.serve_drafts [--loads quotes edits prose …] [--new-tokens 192] [--repeats 5] [--draft 8]

SmolLM2-135M in bfloat16. One engine answers each load with and without drafts, in turns; the ratio is the median over
turns. ``quotes`` continues a text from its prompt, ``edits`` repeats a text with a few changes,
``prose`` is drawn at temperature 0.8, and ``JSON`` has a schema, whose forced tokens are tried. ``quotes`` is asked of
an adapter of each of eight methods too, near its start, so that it still quotes. Before a load is timed, its answers
with drafts must equal those without, greedy tokens without a schema must be the likeliest ones (`likeliest.py`), and an
adapter must score the tokens of the prompt otherwise than the base. The tokens that were tried and right are told too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.lora_step import adapted_by
from bench.report import Rows, add_keep, ends_as_interrupted, keep, working
from bench.same import require_heard
from bench.serving.likeliest import Answered, require_likeliest
from bench.training.methods import MEMBERS, METHODS
from veneer import LLM, LoRARequest, SamplingParams
from veneer.ops.cpu.module import description
from veneer.serve.schedule.outputs import RequestOutput
from veneer.serve.schedule.sampling_params import StructuredOutputsParams
from veneer.serve.schedule.speculation import Draft
from veneer.store.source import resolve

TEXT = Path(__file__).parents[2] / "docs" / "design" / "methods.md"
LETTER = (
    "The harbour lies at the end of a narow road. In the mornings the boats go out together, and in the evenings they "
    "come back one by one. Old men sit on the wall and count them. When one is missing, they say nothing, and look at "
    "the sea. The children play between the nets, which smell of salt and tar, and nobody calls them home before the "
    "last boat is in."
)
SCHEMA = {"type": "array", "minItems": 1000, "items": {
    "type": "object", "additionalProperties": False,
    "required": ["first_name", "last_name", "year_of_birth", "married"],
    "properties": {"first_name": {"type": "string", "maxLength": 12}, "last_name": {"type": "string", "maxLength": 12},
                   "year_of_birth": {"type": "integer", "minimum": 1900, "maximum": 2020},
                   "married": {"type": "boolean"}}}}  # fmt: skip
NEAR = 1e-3  # how far an adapter is from its start


@dataclass(frozen=True)
class Load:
    """Prompts that arrive together, as token ids, with their sampling parameters and adapter.

    ``forced_alone``: no n-grams are tried.
    """

    prompts: list[list[int]]
    params: SamplingParams
    adapter: LoRARequest | None = None
    forced_alone: bool = False


def main() -> None:
    args = arguments()
    ends_as_interrupted()
    with tempfile.TemporaryDirectory() as name:
        place = str(resolve(args.model))
        llm = LLM(
            place, dtype="bfloat16", seed=0, enable_prefix_caching=False, disable_log_stats=False,
            speculative_config={
                "method": "ngram", "num_speculative_tokens": args.draft, "prompt_lookup_max": 4, "prompt_lookup_min": 2
            },
        )  # fmt: skip
        print(f"kernels: {description()}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}", flush=True)
        loads = loads_of(args, llm.engine.tokenizer, Path(name), place)
        rows, figures = Rows(loads, ["plain", "drafts", "ratio", "tried", "right"]), dict[str, float]()
        for title, load in loads.items():
            require_equal(llm, place, title, load)
            plain, drafted, ratio, counts = measured(llm, title, load, args.repeats)
            figures[title] = ratio
            rows.add(title, f"{plain:.1f}", f"{drafted:.1f}", f"{ratio:.2f}", *map(str, counts))
        print(f"output tokens a second of decoding; load {os.getloadavg()[0]:.1f}")
        keep(args.keep, figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--loads", nargs="+", help="titles of the table; all, if not given")
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--draft", type=int, default=8, help="num_speculative_tokens")
    add_keep(parser)
    return parser.parse_args()


def loads_of(args: argparse.Namespace, tokenizer: Any, folder: Path, place: str) -> dict[str, Load]:
    """Every load by its title, those that were asked for."""
    text = tokenizer(TEXT.read_text(encoding="utf-8")[:16_000])["input_ids"]

    def quoting(first: int, n: int = 500) -> list[int]:
        return [*text[first : first + n], *text[first : first + n // 8]]

    def asked(line: str) -> list[int]:
        return list(
            tokenizer.apply_chat_template([{"role": "user", "content": line}], add_generation_prompt=True)["input_ids"]
        )

    n = args.new_tokens
    greedy = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    story = SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_tokens=n, ignore_eos=True)
    form = SamplingParams(temperature=0, max_tokens=n, structured_outputs=StructuredOutputsParams(json=SCHEMA))
    edited = SamplingParams(temperature=0, max_tokens=n)
    edit = f"Correct the spelling of this text, and give back the whole text.\n\n{LETTER}"
    found = {
        "quotes": Load([quoting(0)], greedy),
        "edits": Load([asked(edit)], edited),
        "prose": Load([asked("Tell me a long story about a fisherman and his daughter.")], story),
        "JSON": Load([asked("Make up a list of people, as JSON.")], form, forced_alone=True),
        "JSON, n-grams too": Load([asked("Make up a list of people, as JSON.")], form),
        f"{args.streams} streams quote": Load([quoting(97 * i, 160) for i in range(args.streams)], greedy),
        f"{args.streams} streams of prose": Load(
            [asked(f"Tell me a story about the number {i}.") for i in range(args.streams)], story
        ),
    }
    for number, method in enumerate(MEMBERS, start=1):
        if args.loads is None or f"quotes, {method}" in args.loads:
            adapter = LoRARequest(method, number, str(write_adapter(folder / method, place, method)))
            found[f"quotes, {method}"] = Load([quoting(0)], greedy, adapter)
    return {title: load for title, load in found.items() if args.loads is None or title in args.loads}


def write_adapter(folder: Path, place: str, method: str) -> Path:
    """An adapter that changes the output a little."""
    kind, settings = METHODS[method]
    model = adapted_by("veneer", AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16), kind, settings)
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(NEAR * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def ask(llm: LLM, load: Load, *, drafts: bool) -> list[RequestOutput]:
    """The answers to a load, for which drafts are tried or not."""
    rules: Any = llm.engine._rules
    by_settings = rules.draft
    if not drafts:
        rules.draft = lambda rule: None
    elif load.forced_alone:
        rules.draft = lambda rule: Draft(forced=rule.form.forced)
    try:
        prompts = [{"prompt_token_ids": ids} for ids in load.prompts]
        return llm.generate(prompts, load.params, lora_request=load.adapter, use_tqdm=False)
    finally:
        rules.draft = by_settings


def require_equal(llm: LLM, place: str, title: str, load: Load) -> None:
    """SystemExit if an answer with drafts is another than without, not the model's, or if an adapter is not heard."""
    working(f"{title}: answers with drafts and without")
    drafted, plain = (
        [list(output.outputs[0].token_ids) for output in ask(llm, load, drafts=drafts)] for drafts in (True, False)
    )
    for row, (own, other) in enumerate(zip(drafted, plain, strict=True)):
        if own != other:
            raise SystemExit(f"{title}: answer {row} is {own} with drafts and {other} without")
    if load.params.temperature == 0 and load.params.structured_outputs is None:
        folders = [None if load.adapter is None else load.adapter.lora_path] * len(plain)
        require_likeliest(title, place, map(Answered, load.prompts, plain, folders))
    if load.adapter is not None:
        require_heard(title, scores(llm, load), scores(llm, replace(load, adapter=None)))


def scores(llm: LLM, load: Load) -> list[list[float]]:
    """The log probabilities of the tokens of each prompt behind its first."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = ask(llm, replace(load, params=params), drafts=False)
    return [
        [told[token].logprob for token, told in zip(ids, output.prompt_logprobs or (), strict=True) if told]
        for ids, output in zip(load.prompts, outputs, strict=True)
    ]


def measured(llm: LLM, title: str, load: Load, repeats: int) -> tuple[float, float, float, list[int]]:
    """Tokens a second without drafts and with them, the median ratio, and how many tokens were tried and right."""
    plain, drafted, counts = list[float](), list[float](), [0, 0]
    for turn in range(repeats):
        working(f"{title}: turn {turn + 1} of {repeats}")
        plain.append(rate(ask(llm, load, drafts=False)))
        outputs = ask(llm, load, drafts=True)
        drafted.append(rate(outputs))
        times = [output.metrics for output in outputs if output.metrics is not None]
        counts = [sum(each.num_draft_tokens for each in times), sum(each.num_accepted_tokens for each in times)]
    ratio = statistics.median(a / b for a, b in zip(drafted, plain, strict=True))
    return statistics.median(plain), statistics.median(drafted), ratio, counts


def rate(outputs: list[RequestOutput]) -> float:
    """Tokens a second behind the first, of all answers together."""
    times = [output.metrics for output in outputs if output.metrics is not None]
    return sum((each.num_generation_tokens - 1) / (each.last_token_ts - each.first_token_ts) for each in times)


if __name__ == "__main__":
    main()
