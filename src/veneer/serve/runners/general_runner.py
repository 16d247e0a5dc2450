"""Runner of plans by transformers' own forward pass: for every model whose attention can be paged, and every method.

One token is one batch row, and each row uses the adapter that it names. This runner is the exact one, and slow; the
fast ones are checked against it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapters.peft_model import become_peft_model
from veneer.errors import CompositionError, VeneerError
from veneer.model.adapted.routing import BASE, Routing
from veneer.model.batch.mixed import checked, routed
from veneer.model.batch.paged import KeysValues, PagedModel, PagedStep, SlotStore, Stretch
from veneer.model.sites.virtual_tokens import inner_model, virtual_tokens
from veneer.serve.adapters.mix import Parts
from veneer.serve.adapters.versions import stored_bytes
from veneer.serve.runners.runner import Computed, DrawingRunner, by_request, read, wanted
from veneer.serve.schedule.step_plan import PlannedSequence, StepPlan

_LOG = logging.getLogger(__name__)
Front = dict[int, KeysValues]  # keys and values of virtual tokens by layer, (n, kv_heads, width) each


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """Adapter in a folder, not read yet. ``n_bytes`` is the size of its stored tensors."""

    folder: Path
    n_bytes: int

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folder of the adapter, as the only one."""
        return (self.folder,)


@dataclass(frozen=True, slots=True)
class StoredMix:
    """Adapters of a mix with their weights, not read yet. ``n_bytes`` is the size of their stored tensors."""

    parts: Parts
    n_bytes: int

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of its parts."""
        return tuple(folder for folder, _ in self.parts)


def stored_mix(parts: Parts) -> StoredMix:
    """Return a mix of the adapters in these folders, which need not be read yet.

    Raises FormatError as `stored_bytes` does.
    """
    return StoredMix(parts, sum(stored_bytes(folder) for folder, _ in parts))


class OwnCodeRunner(DrawingRunner):
    """`Runner` whose model loads the adapters itself, after it has become a `PeftModel`. Nothing is packed."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = become_peft_model(model.eval())

    def taken(self, version: str) -> None:
        """Check an adapter that the model has loaded. Raises VeneerError if requests cannot use it."""
        raise NotImplementedError

    def read(self, folder: Path) -> StoredFolder:
        """Return the adapter's folder with its size, which is read from the file's header. No values are read.

        The model itself reads the values later, in `load`.
        """
        return StoredFolder(folder, stored_bytes(folder))

    def read_mix(self, parts: Parts) -> StoredMix:
        """Return the adapters of a mix with the sum of their sizes. No values are read."""
        return stored_mix(parts)

    def kept(self, version: str) -> None:
        """Return None: no packed adapters are on disk, since the model itself loads adapters from their own files."""

    def keep(self, version: str, adapter: StoredFolder | StoredMix) -> None:
        """Write nothing to disk: adapters are loaded from their own files."""

    def load(self, version: str, adapter: StoredFolder | StoredMix) -> None:
        told = ", ".join(map(str, adapter.folders))
        _LOG.info("%s is loaded into the model itself: all requests wait until that is done", told)
        if isinstance(adapter, StoredMix):
            self._load_mix(version, adapter)
        else:
            self.model.load_adapter(adapter.folder, version)
        try:
            self.taken(version)
        except VeneerError:
            self.model.delete_adapter(version)
            raise

    def _load_mix(self, version: str, mix: StoredMix) -> None:
        """Load the parts of a mix, add them up, and free the parts."""
        names = [f"{version}_{number}" for number in range(len(mix.parts))]
        try:
            for name, (folder, _) in zip(names, mix.parts, strict=True):
                self.model.load_adapter(folder, name)
            self.model.add_weighted_adapter(names, [weight for _, weight in mix.parts], version, "cat")
        except CompositionError as error:
            told = str(error)
            for name, (folder, _) in zip(names, mix.parts, strict=True):  # nobody else knows them by these names
                told = told.replace(repr(name), f"in {folder}")
            folders = ", ".join(map(str, mix.folders))
            raise CompositionError(
                f"the adapters in {folders} cannot be summed in a mix: {told}. Ask for them one at a time"
            ) from error
        finally:
            for name in self.loaded.intersection(names):
                self.model.delete_adapter(name)

    def unload(self, version: str) -> None:
        if version in self.loaded:
            self.model.delete_adapter(version)

    def discard(self, pages: Sequence[int]) -> None:
        """Do nothing: memory of plain tensors cannot be freed page by page."""

    @property
    def loaded(self) -> frozenset[str]:
        return frozenset(self.model.peft_config)

    @property
    def base(self) -> PreTrainedModel:
        """Model without the adapters' wrapper, as transformers' own class."""
        return cast(PreTrainedModel, self.model)


class GeneralRunner(OwnCodeRunner):
    """`Runner` by the model's own forward pass, whose attention reads pages only while a plan runs.

    Adapters whose rows cannot be mixed with others, such as those of experts, have a separate pass in a step.
    """

    def __init__(self, model: PreTrainedModel, store: SlotStore) -> None:
        super().__init__(model)
        self.paged, self.store = PagedModel(model), store
        self.fronts: dict[str, Front] = {}
        self.alone: set[str] = set()

    def taken(self, version: str) -> None:
        try:
            checked(self.model, self.model.adapter_state, (version,), ((), {}))
        except CompositionError:
            config = self.model.peft_config[version]
            if config.virtual_tokens or config.invocation_tokens:
                raise
            self.alone.add(version)
        front = self._front(version)
        if front:
            self.fronts[version] = front

    def unload(self, version: str) -> None:
        super().unload(version)
        self.fronts.pop(version, None)
        self.alone.discard(version)

    def compute(self, plan: StepPlan, greedy: Collection[str]) -> Computed:
        logits: dict[str, Tensor] = {}
        hidden: dict[str, Tensor] = {}
        for sequences in self._passes(plan.sequences):
            found, states = self._outputs(sequences)
            counts = [len(wanted(s)) for s in sequences]
            n_wanted, n_read = sum(counts), sum(len(read(s)) for s in sequences)
            parts = torch.split(found[:n_wanted], counts)
            logits |= {s.request_id: part for s, part in zip(sequences, parts, strict=True)}
            hidden |= by_request(sequences, states[n_wanted : n_wanted + n_read])
        return Computed([torch.cat([logits[s.request_id] for s in plan.sequences])], {}, hidden)

    def _passes(self, sequences: Sequence[PlannedSequence]) -> list[list[PlannedSequence]]:
        """Group the sequences into passes: one pass for each version in ``alone``, and one for all other sequences."""
        passes: dict[str | None, list[PlannedSequence]] = {}
        for sequence in sequences:
            passes.setdefault(sequence.version if sequence.version in self.alone else None, []).append(sequence)
        return list(passes.values())

    def _outputs(self, sequences: Sequence[PlannedSequence]) -> tuple[Tensor, Tensor]:
        """Run one pass. Return its logits and hidden states, with one row for each wanted token and then for each
        pooled token.

        Both are in the order of the sequences. If there are no such tokens, both results have one row, which is not
        used.
        """
        device = self.base.device
        for sequence in sequences:
            if sequence.n_front_there < sequence.n_front:
                self._put_front(sequence)
        step = PagedStep.of(self.store, [Stretch(s.pages, s.start, len(s.tokens)) for s in sequences], device)
        ids = torch.tensor([token for s in sequences for token in s.tokens], device=device)
        names = [self._route(s.version) for s in sequences for _ in s.tokens]
        rows = [*_rows_of(sequences, wanted), *_rows_of(sequences, read)]
        kept = torch.tensor(rows, dtype=torch.long, device=device)
        with self._routed(names), self._head_for(kept, names) as states:
            logits = cast(Tensor, self.paged.run(step, ids).logits[:, 0])
        return logits, states[0][:, 0]

    def _route(self, version: str | None) -> str:
        """Return the adapter name that the model uses for a version's rows.

        A version with only virtual tokens uses the base's name, because the keys and values of these tokens are in
        pages.
        """
        return BASE if version is None or version in self.fronts else version

    @contextmanager
    def _routed(self, names: Sequence[str]) -> Iterator[None]:
        state = self.model.adapter_state
        if self.alone.intersection(names):  # then all are of that version
            with state.only((names[0],)):
                yield
        else:
            # only(()): rows take their adapters also where the caller has switched the model's own off
            with state.only(()), routed(self.model, state, Routing(tuple(names), is_by_token=True)):
                yield

    @contextmanager
    def _head_for(self, rows: Tensor, names: Sequence[str]) -> Iterator[list[Tensor]]:
        """Enter a context in which the head sees only these rows of hidden states, or the first row if ``rows`` is
        empty.

        The forward pass appends those hidden states to the list that is yielded.
        """
        rows, states = rows if len(rows) else rows.new_zeros(1), list[Tensor]()
        state, inner = self.model.adapter_state, inner_model(self.base)

        def narrow(module: Any, args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[rows]
            states.append(output.last_hidden_state)
            if state.routing is not None:
                state.routing = Routing(tuple(names[row] for row in rows.tolist()), is_by_token=True)
            return output

        handle = inner.register_forward_hook(narrow)
        try:
            yield states
        finally:
            handle.remove()

    def _put_front(self, sequence: PlannedSequence) -> None:
        first = sequence.n_front_there
        slots = torch.tensor(self.store.slots(sequence.pages, first, sequence.n_front), device=self.base.device)
        for layer, (keys, values) in self.fronts.get(sequence.version or "", {}).items():
            self.store.write(layer, slots, keys[first:], values[first:])

    @torch.no_grad()
    def _front(self, version: str) -> Front:
        """Return the keys and values of an adapter's virtual tokens; an empty dict if it has none.

        A prefix stores its keys and values. For the embeddings of a prompt, the base computes them.
        """
        config = self.model.peft_config[version]
        if not config.virtual_tokens:
            return {}
        if config.modules_to_save:
            raise CompositionError(
                f"an adapter of virtual tokens with modules_to_save={list(config.modules_to_save)} cannot be served. "
                "Generate with the model itself"
            )
        holder = next(h for h in virtual_tokens(self.model).values() if version in h.adapters)
        return holder.keys_and_values(version, self._in_base)

    def _in_base(self, embeddings: Tensor) -> Front:
        """Return the keys and values that the base computes for embeddings."""
        n = len(embeddings)
        store = SlotStore(1, n)
        step = PagedStep.of(store, [Stretch((0,), 0, n)], self.base.device)
        with self._routed([BASE] * n):
            self.paged.run(step, embeddings.to(self.base.dtype))
        return store.layers


def _rows_of(sequences: Sequence[PlannedSequence], tokens: Callable[[PlannedSequence], list[int]]) -> list[int]:
    """Return the rows of certain tokens in a pass over all sequences. ``tokens`` returns their positions in one
    sequence.
    """
    found: list[int] = []
    first = 0
    for sequence in sequences:
        found.extend(first + at for at in tokens(sequence))
        first += len(sequence.tokens)
    return found
