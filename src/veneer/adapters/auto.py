"""Base model and its adapter in one call: ``AutoPeftModelForCausalLM.from_pretrained(adapter)``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import transformers
from transformers import AutoTokenizer

from veneer.adapters.peft_model import PeftModel
from veneer.adapters.tokenizer import TOKENIZER_CONFIG
from veneer.contract import MethodConfig
from veneer.contract.file import CONFIG_FILE
from veneer.contract.source import adapter_folder, hub_options, of_hub
from veneer.errors import ConfigError
from veneer.model.quantized.embedding import CodedEmbedding, table_shape
from veneer.plain.tasks import TaskType
from veneer.store.adapter.config import read_config
from veneer.store.gguf.blocks import described_file
from veneer.store.gguf.model import converted_folder
from veneer.store.in_blocks import load_in_blocks
from veneer.store.named import folder_of
from veneer.store.stored_quantization import with_stored

_AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}
_OF_THE_ADAPTER = ("autocast_adapter_dtype", "ignore_mismatched_sizes", "key_mapping")


class AutoPeftModel:
    """Loader of a base and its adapter: the adapter's config names the base and its class."""

    task: ClassVar[TaskType | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: MethodConfig | None = None,
        revision: str | None = None,
        *,
        gguf: Literal["blocks", "dense"] = "blocks",
        **options: Any,
    ) -> PeftModel:
        """Load an adapter from a folder or a hub id, on the base that its config names.

        ``revision`` is the adapter's. These ``options`` go to the adapter: ``subfolder``, ``autocast_adapter_dtype``,
        ``ignore_mismatched_sizes`` and ``key_mapping``. Hub options (``token``, ``cache_dir`` and the like) go to both.
        All others (``dtype``, ``device_map``, ``quantization_config``) go to the base's ``from_pretrained``.

        A causal language model in a GGUF file stays in its blocks, if no other option than ``dtype`` is given for the
        base; ``gguf="dense"`` makes a dense copy. If the adapter's folder holds a tokenizer with more tokens than the
        base, the base is first resized to it.

        Difference from PEFT: if the adapter names no task, PEFT imports the library that the file names. Here the class
        must be one of transformers. `AutoPeftModel` takes adapters of any task.

        Raises ConfigError if the config names no base or no class, or names another task. Raises FormatError if the
        files cannot be read.
        """
        hub = of_hub(options) | {"revision": revision}
        own = {key: options.pop(key) for key in _OF_THE_ADAPTER if key in options}
        folder = adapter_folder(pretrained_model_name_or_path, hub_options(hub))
        stored = config or read_config(folder)
        if stored.base_model_name_or_path is None:
            raise ConfigError(f"{folder} does not name its base: load it, and call PeftModel.from_pretrained on it")
        options.pop("subfolder", None)
        kind = cls._class_of_base(stored, folder)
        base = _loaded(kind, stored.base_model_name_or_path, stored.revision, options, in_blocks=gguf == "blocks")
        if (folder / TOKENIZER_CONFIG).is_file():
            where = {"subfolder": "", **{key: value for key, value in hub.items() if value is not None}}
            make_room_for(AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **where), base)
        return PeftModel.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **own, **hub
        )

    @classmethod
    def _class_of_base(cls, config: MethodConfig, folder: Path) -> Any:
        task = TaskType(config.task_type) if config.task_type else cls.task
        if cls.task not in (None, task):
            raise ConfigError(
                f"{cls.__name__} is for task_type={cls.task!s}, this adapter for {config.task_type!r}: use "
                "AutoPeftModel, which takes any, or the class of that task"
            )
        return getattr(transformers, _AUTO_CLASSES[task]) if task else _named_class(folder)


def _loaded(kind: Any, name: str, revision: str | None, options: dict[str, Any], *, in_blocks: bool) -> Any:
    """Load the base ``name`` by its class ``kind``, and return it.

    If ``in_blocks`` and no option except the dtype is given, a causal language model in a GGUF file stays in the file's
    blocks. Otherwise a GGUF file is first converted to a dense copy.
    """
    place = folder_of(name)
    file = None if place is None else described_file(place)
    in_blocks = in_blocks and kind is transformers.AutoModelForCausalLM and options.keys() <= {"dtype"}
    if file is not None and in_blocks:
        return load_in_blocks(file, **options)[0]
    if file is not None:
        place = converted_folder(file.path)
    named = place or name
    return kind.from_pretrained(named, revision=revision, **with_stored(named, options))


def _named_class(folder: Path) -> Any:
    mapping = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("auto_mapping") or {}
    name, library = str(mapping.get("base_model_class")), str(mapping.get("parent_library"))
    found = getattr(transformers, name, None) if library.split(".")[0] == "transformers" else None
    if not hasattr(found, "from_pretrained"):
        raise ConfigError(
            f"{folder} names neither a task nor a class of transformers for its base (auto_mapping={mapping}): load "
            "the base yourself and call PeftModel.from_pretrained on it, or use the class of a task"
        )
    return found


def make_room_for(tokenizer: Any, base: Any) -> None:
    """Resize the base's vocabulary if the tokenizer has more tokens.

    Raises ConfigError if the base stays in the blocks of a GGUF file, because its embeddings cannot be resized.
    """
    table = base.get_input_embeddings()
    n_tokens, _ = table_shape(table)
    if len(tokenizer) <= n_tokens:
        return
    if isinstance(table, CodedEmbedding):
        raise ConfigError(
            f"the tokenizer has {len(tokenizer):,} tokens, more than the {n_tokens:,} of the base's table. It stays "
            'in the blocks of its GGUF file, which cannot grow: load the base with gguf="dense"'
        )
    base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """`AutoPeftModel` for ``CAUSAL_LM``."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` for ``SEQ_2_SEQ_LM``."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` for ``SEQ_CLS``."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` for ``TOKEN_CLS``."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` for ``QUESTION_ANS``."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` for ``FEATURE_EXTRACTION``."""

    task = TaskType.FEATURE_EXTRACTION
