"""Type of every tensor of a quantized file: llama-quantize's mixes, as data and three rules. No tensor is read.

Source: ggml-org/llama.cpp, src/llama-quant.cpp (b9190: a fused ``attn_qkv`` follows the rule of ``attn_v``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from veneer.errors import ConfigError
from veneer.export.gguf.mixes import Mix
from veneer.ops.ggml_types import GGML_TYPES
from veneer.store.gguf.writer import TensorSpec

Shapes = Mapping[str, tuple[int, ...]]
FLOATS = ("F32", "F16", "BF16")
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight", "attn_rel_b.weight",
    "ssm_conv1d.weight", "shortconv.conv.weight",
)  # fmt: skip
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixOptions:
    """Exceptions to a mix. ``pure``: every matrix has the default type.

    ``output`` and ``embedding`` are the types of head and embeddings. ``by_name`` maps regular expressions to types;
    the first that is found in a tensor's name counts.
    """

    pure: bool = False
    output: str | None = None
    embedding: str | None = None
    by_name: Sequence[tuple[str, str]] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixFacts:
    """Facts of a model that the rules read in addition to the names and shapes of its tensors."""

    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_experts: int = 0

    @property
    def is_70b(self) -> bool:
        """Return True if llama-quantize treats the model as a 70B: 80 layers, and either Llama with grouped heads or
        Qwen2.
        """
        grouped = self.architecture == "llama" and self.n_heads != self.n_kv_heads
        return self.n_layers == 80 and (grouped or self.architecture == "qwen2")


def quantize_order(names: Sequence[str]) -> list[str]:
    """Return the names in llama-quantize's order: first those without a layer, then layer by layer,
    bytewise in each.
    """
    return sorted(names, key=lambda name: (_layer(name), name.encode()))


def chosen_types(
    shapes: Shapes, mix: Mix, facts: MixFacts, options: MixOptions | None = None, *, weighed: bool = False
) -> list[TensorSpec]:
    """Return the type and shape of every tensor, in the file's order. ``weighed``: an importance matrix is used.

    Raises ConfigError for unknown types and invalid expressions in the options, and for expressions that match no
    matrix.
    """
    options = options or MixOptions()
    _check(options)
    names = quantize_order(list(shapes))
    _require_found(options, [name for name in names if _is_matrix(name, shapes[name])])
    wanted = _Rules(mix, facts, weighed, shapes).walk(names)
    specs = []
    for name in names:
        kind = "F32"
        if _is_matrix(name, shapes[name]):
            chosen = _by_option(name, options, shapes) or (mix.default if options.pure else wanted[name])
            kind = fitting(chosen, shapes[name][-1])
        specs.append(TensorSpec(name, kind, shapes[name]))
    return specs


def fitting(kind: str, columns: int) -> str:
    """Return the ggml type ``kind`` if its blocks divide a row of ``columns`` values, otherwise its fallback type."""
    if columns % GGML_TYPES[kind].block == 0:
        return kind
    other = _FALLBACK.get(kind)
    return other if other and columns % GGML_TYPES[other].block == 0 else "F16"


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and name.endswith("weight") and not name.endswith(_KEPT)


class _Rules:
    """Rules that give every matrix its quantization type. Tensors of one kind are counted in the file's order."""

    def __init__(self, mix: Mix, facts: MixFacts, weighed: bool, shapes: Shapes) -> None:
        self._mix, self._facts, self._weighed, self._shapes = mix, facts, weighed, shapes
        self._n_values = sum(_role(name) in _VALUES for name in shapes if _is_matrix(name, shapes[name]))

    def walk(self, names: Sequence[str]) -> dict[str, str]:
        """Return the type of each matrix by name."""
        found: dict[str, str] = {}
        n_values = n_down = 0
        for name in names:
            if not _is_matrix(name, self._shapes[name]):
                continue
            role = _role(name)
            if self._mix.default in FLOATS:
                found[name] = self._mix.default
            elif name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in self._shapes):
                found[name] = self._head(name)
            elif role in _VALUES:
                found[name] = self._values(n_values)
                n_values += 1
            elif role.startswith("ffn_down"):
                found[name] = self._down(_layer(name) if self._facts.n_experts > 1 else n_down)
                n_down += 1
            else:
                found[name] = self._other(role)
        return found

    def _head(self, name: str) -> str:
        default = self._mix.default
        fits = self._shapes[name][-1] % GGML_TYPES[default].block == 0
        return "Q6_K" if fits and default != "Q8_0" else "Q8_0"

    def _values(self, i: int) -> str:
        grouped = self._facts.n_heads >= 4 * self._facts.n_kv_heads
        kind = {
            "Q2_K": "Q4_K" if grouped else "Q3_K",
            "Q2_K_S": "Q4_K" if grouped else "Q2_K",
            "Q3_K_M": "Q5_K" if i < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if i < 4 else "Q4_K",
            "Q4_K_M": "Q6_K" if _more(i, self._n_values) else "Q4_K",
            "Q5_K_M": "Q6_K" if _more(i, self._n_values) else "Q5_K",
            "IQ4_NL": "Q5_K" if grouped else "IQ4_NL",
            "IQ4_XS": "Q5_K" if grouped else "IQ4_XS",
        }.get(self._mix.name, self._mix.default)
        if self._facts.is_70b and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
        return "Q8_0" if self._facts.n_experts == 8 else kind

    def _down(self, i: int) -> str:
        n, default = self._facts.n_layers, self._mix.default
        first, more = i < n // 8, _more(i, n)
        return {
            "Q2_K": "Q3_K",
            "Q2_K_S": "Q4_K" if first else default,
            "Q3_K_M": "Q5_K" if i < n // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if first else default,
            "Q4_K_M": "Q6_K" if more else default,
            "Q5_K_M": "Q6_K" if more else default,
            "IQ4_NL": "Q5_K" if first and not self._weighed else default,
            "IQ4_XS": "Q5_K" if first and not self._weighed else default,
            "Q4_0": "Q4_1" if first and self._weighed else default,
            "Q5_0": "Q5_1" if first and self._weighed else default,
        }.get(self._mix.name, default)

    def _other(self, role: str) -> str:
        name, default = self._mix.name, self._mix.default
        if role == "attn_k" and self._facts.n_experts == 8:
            return "Q8_0"
        if role == "attn_output" and self._facts.n_experts == 8:
            mixed = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if name in mixed else default
        if role == "attn_output":
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name, default)
        return default


def _more(i: int, n: int) -> bool:
    """Return True for the first and the last eighth of n layers, and for every third one between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _role(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _by_option(name: str, options: MixOptions, shapes: Shapes) -> str | None:
    tied = "output.weight" not in shapes
    if name == "token_embd.weight" and options.embedding:
        return options.embedding.upper()
    if options.output and (name == "output.weight" or (name == "token_embd.weight" and tied)):
        return options.output.upper()
    found = next((kind for pattern, kind in options.by_name if re.search(pattern, name)), None)
    return found.upper() if found else None


def _check(options: MixOptions) -> None:
    problems: list[str] = []
    kinds = [options.output, options.embedding, *(kind for _, kind in options.by_name)]
    problems += [
        f"type {kind!r} of a tensor is unknown; allowed: {', '.join(GGML_TYPES)}"
        for kind in kinds
        if kind is not None and kind.upper() not in GGML_TYPES
    ]
    for pattern, _ in options.by_name:
        problems += _wrong(re.compile, pattern)
    if problems:
        raise ConfigError("; ".join(problems))


def _require_found(options: MixOptions, matrices: Sequence[str]) -> None:
    lost = [pattern for pattern, _ in options.by_name if not any(re.search(pattern, name) for name in matrices)]
    if lost:
        leaves = ", ".join(dict.fromkeys(_role(name) for name in matrices))
        raise ConfigError(
            f"{' and '.join(map(repr, lost))}: found in no name of this model's matrices, which are called such as "
            f"{matrices[-1]}: {leaves}"
        )


def _wrong(compile_: Callable[[str], object], pattern: str) -> list[str]:
    try:
        compile_(pattern)
    except re.error as error:
        return [f"{pattern!r} is no regular expression ({error})"]
    return []
