"""Makes the blocks of a model run on fused kernels, in place, and undoes it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.errors import DescriptionError
from veneer.model.adapted.holder import Holder
from veneer.model.blueprint import decoder as blueprint
from veneer.model.blueprint.describe import blocks_of, describe
from veneer.model.blueprint.masks import MAKERS, types_in
from veneer.model.blueprint.parts import Several
from veneer.model.blueprint.read_forward import globals_named, hands_on
from veneer.model.fused.block import SPECIAL, FusedBlock, keeps_state, leave_out_unfit
from veneer.model.fused.layout import LayoutMask, layout_mask
from veneer.model.fused.proof import STRANGE, prove
from veneer.model.inplace import InPlace, change_class, restore_class
from veneer.model.program.halves import BlockProgram, block_program, reasons
from veneer.model.sites.structure import evaluation
from veneer.ops.dispatch import lacks

log = logging.getLogger(__name__)

KERNELS = {"cpu": "cpu", "cuda": "triton"}
EXTRAS = (*SPECIAL, "token_type_ids")
FEW_PARAMETERS = 1_000_000_000  # up to which one thread checks a model in a second or two
NOTHING_FITS = "every part of its blocks is hooked, trained, or computes in another dtype than the stream"


class FusedDecoder(InPlace, nn.Module):
    """Mixin before the class of the module that holds the blocks. Its forward passes the layout of the batch's
    sequences to the blocks in place of the attention mask.
    """

    keeps_state: bool  # a block of it does: each type of layer then gets a mask of its own

    @classmethod
    def own_body(cls, base: type[nn.Module]) -> dict[str, Any]:
        return {"forward": _with_layout(base.forward)}

    def build_alibi_tensor(self, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        """Return the bias of attention by position, for blocks that run BLOOM's own code."""
        if isinstance(attention_mask, LayoutMask):
            given = attention_mask.given["attention_mask"]
            device = next(self.parameters()).device
            attention_mask = torch.ones(attention_mask.size_of_batch, device=device) if given is None else given
        bias: Tensor = cast(Any, super()).build_alibi_tensor(attention_mask, num_heads, dtype)
        return bias

    def layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayoutMask | None:
        """Return the layout of a batch's sequences, from the arguments of a forward pass. Within the context `forked`,
        return the layout given there.

        Return None if the arguments ask for a cache or for attention weights, or if they hold a cache or a custom mask.
        In training, no cache is used unless one is asked for.
        """
        if "forked" in vars(self):
            return cast(LayoutMask, vars(self)["forked"]())
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        config = cast(Any, self).config
        caches = kwargs.get("use_cache")
        if caches is None:
            caches = config.use_cache and not (self.training and torch.is_grad_enabled())
        weights = kwargs.get("output_attentions")
        if weights is None:
            weights = getattr(config, "output_attentions", False)
        if tokens is None or len(args) > 1 or caches or weights or any(kwargs.get(name) is not None for name in EXTRAS):
            return None
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, dict):
            mask = vars(self).get("given_mask", mask)
        if not all(given is None or isinstance(given, Tensor) for given in (mask, positions)):
            return None
        if positions is not None and positions.ndim == 3:  # of text, time, height and width, or without those of text
            positions = positions[0] if len(positions) == 4 else None
        positions = None if counts_positions(self) else positions
        return layout_mask((tokens.shape[0], tokens.shape[1]), mask, positions, config)


def _with_layout(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)  # those who ask for the arguments (virtual tokens, generate) find the model's own
    def forward(self: FusedDecoder, *args: Any, **kwargs: Any) -> Any:
        mask, given = self.layout(args, kwargs), kwargs.get("attention_mask")
        if mask is not None:
            known = (*MAKERS, *types_in(cast(Any, self).config)) if self.keeps_state else ()
            types = given if isinstance(given, dict) else known
            masks = dict.fromkeys(types, mask) if types else mask  # one for each type of layer
            kwargs = {**kwargs, "attention_mask": masks, "use_cache": False}
            if counts_positions(self) and kwargs.get("position_ids") is None:
                real = mask.given["attention_mask"]
                if real is None:
                    place = next(self.parameters()).device  # XGLM computes its table of positions: it holds no weight
                    real = torch.ones(mask.size_of_batch, dtype=torch.long, device=place)
                kwargs["position_ids"] = (real.cumsum(dim=1) * real - 1).long()
        return plain(self, *args, **kwargs)

    return forward


def counts_positions(decoder: nn.Module) -> bool:
    """Return True if the decoder counts positions from the mask (OPT). Position ids that restart then do not separate
    packed sequences.
    """
    return hasattr(getattr(decoder, "embed_positions", None), "offset")


class WithImages(InPlace, nn.Module):
    """Mixin before the class of a model with images. If a batch has text alone, the mixin gives the caller's mask
    unchanged to the text decoder, which needs it to find the sequences.
    """

    text_half: list[FusedDecoder]  # in a list, which is no submodule

    @classmethod
    def own_body(cls, base: type[nn.Module]) -> dict[str, Any]:
        return {"forward": _with_given_mask(base.forward)}


def _with_given_mask(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(self: WithImages, *args: Any, **kwargs: Any) -> Any:
        images, kinds = kwargs.get("pixel_values"), kwargs.get("token_type_ids")
        given = kwargs.get("attention_mask")
        if len(args) > 1 or images is not None or isinstance(given, dict) or (kinds is not None and kinds.any()):
            return plain(self, *args, **kwargs)
        half = vars(self.text_half[0])
        half["given_mask"] = given
        try:
            return plain(self, *args, **kwargs)
        finally:
            del half["given_mask"]

    return forward


def fuse(model: PreTrainedModel) -> bool:
    """Make the blocks of a model run on fused kernels, in place. Return True if at least one block does; a second call
    changes nothing.

    The model's description determines the parts of a block. Values then verify it: what each block adds to the residual
    stream of a short batch must equal the model's own result, up to rounding. A half that differs runs the model's own
    code, and the reason is logged. If no half can be fused, the model stays unchanged.
    """
    if is_fused(model):
        return True
    try:
        reason = _fuse(model)
    except STRANGE as error:
        reason = f"its blocks have a known structure, but fused they fail: {type(error).__name__}: {error}"
    if reason is not None:
        log.warning("%s runs the general path, not the fused one: %s", type(model).__name__, reason)
        unfuse(model)
    return reason is None


def fuse_as_described(model: PreTrainedModel) -> str | None:
    """Fuse a model whose tensors have no values, as `fuse` does, if the blocks match their description.

    Return the reason if they do not, otherwise None.
    """
    try:
        described = describe(model)
    except DescriptionError as error:
        return str(error)
    reason = _change_blocks(model, described)
    if reason is not None:
        unfuse(model)
        return reason
    blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
    with evaluation(model), _base_alone(model):
        for block in blocks:
            leave_out_unfit(block, stream_dtype(model, block))
    if all(block.fused_program.is_own for block in blocks):
        unfuse(model)
        return NOTHING_FITS
    return None


def stream_dtype(model: PreTrainedModel, block: FusedBlock) -> torch.dtype:
    """Return the dtype of the residual stream: that of a norm's weight, or of the embeddings."""
    norms = (cast(nn.Module, getattr(block, norm.path)) for norm in block.fused_program.block.norms.all if norm.weight)
    owner = next(norms, None) or model.get_input_embeddings()
    return cast(Tensor, owner.weight).dtype


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in model.modules():
        if isinstance(module, (FusedBlock, FusedDecoder, WithImages)):
            restore_class(module)
            for name in ("fused_program", "text_half", "keeps_state"):
                module.__dict__.pop(name, None)


def is_fused(model: nn.Module) -> bool:
    """Return True if `fuse` has replaced the model's blocks."""
    return any(isinstance(module, FusedDecoder) for module in model.modules())


@contextmanager
def fused(model: PreTrainedModel) -> Iterator[bool]:
    """Enter a context in which a model runs fused if it can; afterwards it is as before."""
    before = is_fused(model)
    try:
        yield fuse(model)
    finally:
        if not before:
            unfuse(model)


def _fuse(model: PreTrainedModel) -> str | None:
    """Fuse the blocks, and return None, or the reason if they cannot be fused."""
    try:
        described = describe(model)
    except DescriptionError as error:
        return str(error)
    reason = _change_blocks(model, described)
    if reason is not None:
        return reason
    blocks = [cast(FusedBlock, block) for block in blocks_of(model)[1]]
    exact = torch.autocast(model.device.type, enabled=False)
    with evaluation(model), _base_alone(model), torch.no_grad(), exact, _few_threads(model):
        problem, left_out = prove(model, blocks)
    told = "; ".join(left_out)
    if problem is not None or all(block.fused_program.is_own for block in blocks):
        return problem or told or NOTHING_FITS
    if told:
        log.warning(
            "parts of the blocks of %s run transformers' code, not fused kernels: %s", type(model).__name__, told
        )
    return None


@contextmanager
def _few_threads(model: nn.Module) -> Iterator[None]:
    """Enter a context in which a small model computes on one thread.

    With a proof's few tokens, a product takes microseconds, less than the synchronization of threads. On busy cores the
    whole proof took 50 s with several threads, and 8 s with one.
    """
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in model.parameters()) <= FEW_PARAMETERS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _no_kernels(device: str) -> str | None:
    """Return why a kind of device has no kernels for blocks, or None if it has."""
    if device not in KERNELS:
        return f"there are no kernels for {device}"
    missing = lacks("attention.attention_forward", KERNELS[device])
    return f"there are no kernels for {device}: {missing}" if missing else None


def _change_blocks(model: PreTrainedModel, described: blueprint.Decoder) -> str | None:
    """Change the classes of the blocks and of the module that holds them. Return the reason if that is impossible."""
    holder, layers = blocks_of(model)
    reason = _no_kernels(model.device.type)
    if reason is not None:
        return reason
    width = described.embedding.width
    programs = [block_program(block, width) for block in described.blocks]
    problem = next((program for program in programs if isinstance(program, str)), None)
    borders = "; ".join(dict.fromkeys(reason for block in described.blocks for reason in reasons(block, width)))
    if problem is None and all(cast(BlockProgram, program).is_own for program in programs):
        problem = borders
    keeps_state = any(_keeps_state(block) for block in described.blocks)
    if keeps_state and not _takes_masks_by_type(holder):
        problem = "it has layers with a recurrent state, and the decoder's forward takes no mask for each type of layer"
    if any(part.alibi is not None and part.alibi.rounded for part in described.attentions):
        problem = borders  # the model's forward adds the bias to a mask of its own
    handed = hands_on(holder)
    if handed is not None:
        problem = f"it passes {handed} on to the next block"
    if problem is not None:
        return f"a block does not fit: {problem}"
    if borders:
        log.info(
            "parts of the blocks of %s run transformers' code, not fused kernels: %s", type(model).__name__, borders
        )
    for block, program in zip(layers, programs, strict=True):
        change_class(block, FusedBlock)
        cast(FusedBlock, block).fused_program = cast(BlockProgram, program)
    change_class(holder, FusedDecoder)
    vars(holder)["keeps_state"] = keeps_state
    if holder is not model.base_model and model.config is not model.config.get_text_config():
        change_class(model.base_model, WithImages)
        vars(model.base_model)["text_half"] = [holder]
    return None


def _takes_masks_by_type(holder: nn.Module) -> bool:
    """Return True if a decoder's forward accepts a dict of masks by layer type. For a layer type that is not in the
    dict, such a forward makes a mask from padding alone.
    """
    return {"create_recurrent_attention_mask", "isinstance", "dict"} <= globals_named(holder)


def _keeps_state(block: blueprint.Block) -> bool:
    """Return True if a part of a block may keep a state."""
    return isinstance(block.attention, Several) or keeps_state(block.attention)


@contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """Enter a context in which no adapter acts and every weight counts as frozen."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = {id(m.adapter_state): m.adapter_state for m in model.modules() if isinstance(m, Holder)}
    with ExitStack() as stack:
        for state in states.values():
            stack.enter_context(state.base_alone())
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
