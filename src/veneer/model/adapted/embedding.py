"""Embeddings with adapters, in place: a table is the linear layer (d, n_tokens) applied to one-hot rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from veneer.model.adapted.linear import AdaptedSite
from veneer.model.blueprint.tables import own_multiplier
from veneer.quant.dense import DenseWeight
from veneer.records.linear import apply_embedding, compose_linear
from veneer.records.sites import LinearSite
from veneer.records.token_rows import look_up_rows


class AdaptedEmbedding(AdaptedSite):
    """Mixin before an embedding's class. The class's own forward runs first, and the adapters' updates are added to its
    output.
    """

    def forward(self, token_ids: Tensor) -> Tensor:
        routing = self.adapter_state.routed()
        held = [] if routing is None else [name for name in routing.adapters if self.holds(name)]
        if routing is not None and held:
            return self.by_rows(routing, held, (token_ids,), {})  # a look-up per row anyway: nothing is read twice
        looked_up = cast(Tensor, super().forward(token_ids))
        multiplier = own_multiplier(self)
        for rows in self.token_rows(self.adapter_state.acting()):
            index, values = rows.index(token_ids.device), rows.trainable_tokens_delta.to(looked_up.dtype) * multiplier
            looked_up = look_up_rows(token_ids, looked_up, index, values, cast(Any, self).padding_idx)
        names = self.acting_here()
        if not names:
            return looked_up
        site = self.site()
        delta = compose_linear([self.record_now(name, None, site) for name in names]).with_adds_times(multiplier)
        return apply_embedding(delta, token_ids, looked_up, cast(Any, self).padding_idx)

    def site(self, names: Sequence[str] | None = None) -> LinearSite:
        weight = cast(Tensor, self.effective("weight", names))
        n_tokens, d = weight.shape
        return LinearSite(
            name=self.site_name,
            in_features=n_tokens,
            out_features=d,
            kind="embedding",
            weight=DenseWeight(weight.T),
            row_sq=self._row_sq,
        )

    @property
    def is_turned(self) -> bool:
        return True


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the model's input embeddings, or None if the model has none (as many models of images or sound)."""
    try:
        return cast("nn.Module | None", cast(Any, model).get_input_embeddings())
    except NotImplementedError:  # transformers' answer for a model without a table
        return None


def weight_of_embedding(module: nn.Module) -> DenseWeight:
    """Return the table as the matrix (d, n_tokens)."""
    return DenseWeight(cast(Tensor, module._parameters["weight"]).T)


def is_embedding(module: nn.Module) -> bool:
    """Return True if a module is an embedding that can be adapted; one that renormalizes its table cannot."""
    return isinstance(module, nn.Embedding) and module.max_norm is None
