"""A model written and read again computes what it did: every family, also those that transformers does not read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.errors import FormatError
from veneer.export.gguf.model import GgufOptions, export_gguf
from veneer.store.gguf.model import convert_gguf, header_config

from .tiny import SETTINGS, VOCAB, tiny_folder, tokenizer

IDS = torch.tensor([[(i * 37 + 11) % (VOCAB - 3) for i in range(60)]])


@pytest.mark.parametrize("family", sorted(SETTINGS.keys() - {"stablelm-norms"}))
@torch.no_grad()
def test_logits_and_tokens_come_back(tmp_path: Path, family: str) -> None:
    model = tiny_folder(tmp_path / "model", family)
    export_gguf(tmp_path / "model", tmp_path / "x.gguf", GgufOptions(type="F32"))
    convert_gguf(tmp_path / "x.gguf", tmp_path / "read")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "read", attn_implementation="eager").eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    own, read = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("model", "read"))
    assert told(header_config(tmp_path / "x.gguf")) == told(loaded.config)
    text = "the other  12 on<|stop|>"
    assert read(text)["input_ids"] == own(text)["input_ids"]
    assert read.eos_token == "<|stop|>"
    assert read.chat_template == tokenizer().chat_template


def told(config: Any) -> dict[str, Any]:
    """All of a config but where it was read from."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("_name_or_path", "architectures", "transformers_version")
    }


def rewritten(
    source: Path, target: Path, drop: str = "", add: str = "", pairs: Mapping[str, Any] | None = None
) -> None:
    """A file without a tensor, with one more, or with other pairs; None leaves one out."""
    reader, changes = GGUFReader(source), dict(pairs or {})
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")) and changes.get(name, 0) is not None:
            item = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, changes.pop(name, field.contents()), field.types[0], sub_type=item)
    for name, value in changes.items():
        if value is not None:
            writer.add_uint32(name, value)
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if add:
        writer.add_tensor(add, reader.tensors[0].data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"drop": "blk.1.ffn_up.weight"}, r"lacks the tensors of \['model\.layers\.1\.mlp\.up_proj\.weight'\]"),
        ({"add": "blk.1.attn_sinks.weight"}, r"blk\.1\.attn_sinks\.weight.*has no place"),
        ({"pairs": {"olmo2.some.later_invention": 3}}, r"some\.later_invention 3"),
    ],
)
def test_files_that_say_more_or_less_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    tiny_folder(tmp_path / "model", "olmo2")
    export_gguf(tmp_path / "model", tmp_path / "x.gguf", GgufOptions(type="F32"))
    rewritten(tmp_path / "x.gguf", tmp_path / "y.gguf", **change)
    with pytest.raises(FormatError, match=reason):
        convert_gguf(tmp_path / "y.gguf", tmp_path / "read")
