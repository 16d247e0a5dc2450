"""Implementation of ``veneer export as-lora``."""

from __future__ import annotations

from typing import Any, cast

import torch
import typer

from veneer.adapters.as_lora import save_as_lora
from veneer.cli.loading import load
from veneer.cli.pages.export_as_lora import AsLoraArguments

_TOKENS = (2, 64)  # on which the logits are compared


def as_lora(args: AsLoraArguments) -> None:
    """Write the adapter as plain LoRA, and print its rank and its errors."""
    if args.base is None:
        model = load(str(args.adapter), dtype="float32").model
    else:
        model = load(args.base, args.adapter, dtype="float32").model
    if args.task is not None:
        model.set_task(args.task)
    vocabulary = int(cast(Any, model.config).get_text_config().vocab_size)
    tokens = torch.randint(vocabulary, _TOKENS, generator=torch.Generator().manual_seed(0))
    ids = tokens.to(model.device)
    if args.rank is not None:
        typer.echo("an update that is no low-rank pair is decomposed, one matrix for each layer", err=True)
    found = save_as_lora(args.output, model, args.rank, model.active_adapter, progressbar=True, input_ids=ids)
    ranks = [layer.rank for layer in found.layers.values()]
    told = f"{args.output}: LoRA of rank {max(ranks)} on {len(ranks)} layers"
    if found.error == 0:
        typer.echo(f"{told}, exact; the logits differ by {found.of_logits:.2g} of their change")
        return
    worst = f"{found.layers[found.worst_layer].error:.2%} of {found.worst_layer}"
    typer.echo(
        f"{told}; lost of the update: {found.error:.2%} ({worst}); of the change of the logits: {found.of_logits:.2%}"
    )
