"""Runner of plans by the model's program, which is fast. Adapters that the program cannot express take the general
runner.

The program is verified on the model when the runner is created. The general runner has the same weights and the same
pages, and its requests run in the same steps.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapters.peft_model import PeftModel
from veneer.contract import MethodConfig
from veneer.errors import DescriptionError, TargetError
from veneer.model.adapted.packed_experts import pack_experts
from veneer.model.adapted.state import base_alone
from veneer.model.batch.own_cache import proved_way
from veneer.model.batch.paged import TOLERANCE, KeysValues, SlotStore, Stretch, require_pageable
from veneer.model.blueprint.describe import describe
from veneer.model.memory.give_back import give_back
from veneer.model.modules.snapshot import look_at
from veneer.model.program.expert_stacks import Stacks
from veneer.model.program.program import Program, compile_program
from veneer.model.program.version import Effects
from veneer.model.quantized.packed_linear import PackedGroup, is_packed, pack_group, unpack
from veneer.model.sites.places import plan_of
from veneer.model.sites.structure import evaluation
from veneer.ops.memory import whole_numbers
from veneer.ops.paged_attention import UNIT
from veneer.ops.pairs import Factor
from veneer.plain.progress import waiting_for
from veneer.plain.tensor_tree import bytes_of, moved
from veneer.records.deltas import PromptDelta
from veneer.serve.adapters.block_store import BlockStore
from veneer.serve.adapters.layouts import Layouts
from veneer.serve.adapters.mix import Parts, read_mix
from veneer.serve.adapters.versions import stored_bytes
from veneer.serve.program.block import PackedEffects, VersionBlock
from veneer.serve.program.effects import Lookup, UnsaidError, effects_of, read_effects
from veneer.serve.program.interpreter import Interpreter
from veneer.serve.program.kv_cache import make_cache
from veneer.serve.program.step import Piece, sent, step_of, step_on_host
from veneer.serve.runners.general_runner import GeneralRunner, OwnCodeRunner, StoredFolder, StoredMix, stored_mix
from veneer.serve.runners.own_cache_runner import OwnCacheRunner
from veneer.serve.runners.runner import Computed, DrawingRunner, by_request, read, wanted
from veneer.serve.schedule.step_plan import PlannedSequence, StepPlan
from veneer.store.adapter.config import read_config

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProgramAdapter:
    """Adapter packed for the program; ``prefix`` are the keys and values of a prefix, by layer.

    ``n_bytes`` is the size of all its tensors. The loading thread counts it, so that no step waits.
    """

    packed: PackedEffects
    prefix: list[KeysValues]
    n_bytes: int

    @property
    def is_block(self) -> bool:
        """Return True if the adapter consists only of its block."""
        return self.packed.is_block and not self.prefix


@dataclass(frozen=True, slots=True)
class GeneralAdapter:
    """Adapter for the model's own code, with the reason."""

    stored: StoredFolder | StoredMix
    reason: str

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors, as they are stored."""
        return self.stored.n_bytes


class ProgramRunner(DrawingRunner):
    """`Runner` of a model's program.

    If adapters are attached to the model itself, a pass and the reading of an adapter exclude each other. If ``alone``,
    there is no general runner: `read` raises `UnsaidError` for an adapter that the program cannot express. ``store``
    keeps adapters on disk that consist only of a packed block of memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        interpreter: Interpreter,
        n_pages: int,
        block: int,
        *,
        alone: bool = False,
        store: BlockStore | None = None,
    ) -> None:
        super().__init__()
        self.alone, self.store = alone, store
        self.model, self.interpreter, self.block = model.eval(), interpreter, block
        self.device = model.device  # asked once: a model looks for its first parameter
        self.cache = make_cache(interpreter.program, n_pages, block, model.dtype, self.device)
        self.fronts: dict[str, list[KeysValues]] = {}
        self.general: OwnCodeRunner | None = None
        self._lookup, self._layouts = Lookup(self.model), Layouts()
        self._modules = threading.Lock()  # the general runner changes them, and reading looks at them

    @property
    def loaded(self) -> frozenset[str]:
        others = frozenset[str]() if self.general is None else self.general.loaded
        return frozenset(self.interpreter.versions) | others

    def read(self, folder: Path) -> ProgramAdapter | GeneralAdapter:
        known = self._layouts.read(folder)
        if known is not None:
            return self.of_block(known)
        effects = partial(read_effects, folder=folder)
        learn = partial(self._layouts.learn, folder)
        return self._read(effects, lambda: StoredFolder(folder, stored_bytes(folder)), learn)

    def kept(self, version: str) -> ProgramAdapter | None:
        block = None if self.store is None else self.store.find(version)
        return None if block is None or not self.interpreter.fits(block) else self.of_block(block)

    def keep(self, version: str, adapter: ProgramAdapter | GeneralAdapter) -> None:
        if self.store is not None and isinstance(adapter, ProgramAdapter) and adapter.is_block:
            block = adapter.packed.linears
            self.store.keep(version, block if self.device.type == "cpu" else moved(block, torch.device("cpu")))

    def read_mix(self, parts: Parts) -> ProgramAdapter | GeneralAdapter:
        return self._read(partial(read_mix, parts=parts), lambda: stored_mix(parts))

    def pack(
        self, config: MethodConfig, tensors: Mapping[str, Tensor], told: str
    ) -> tuple[ProgramAdapter, list[Factor]]:
        """Return an adapter for `load`, and its packed factors, from its config and its tensors by their keys on disk.

        ``told`` is the adapter's name in errors. Raises FormatError, TargetError, and `UnsaidError` if the program
        cannot express the adapter.
        """
        with self._modules:
            effects = effects_of(self._lookup, self.interpreter.program, Path(told), config, tensors)
        packed, factors = self.interpreter.packed_of(effects)
        return self._placed(packed, self._prefix(effects)), factors

    def of_block(self, block: VersionBlock) -> ProgramAdapter:
        """Return an adapter for `load` that consists only of its block."""
        return self._placed(PackedEffects(Effects(), block, {}), [])

    def _read(
        self,
        effects_on: Callable[[Lookup, Program], Effects],
        stored: Callable[[], StoredFolder | StoredMix],
        learn: Callable[[VersionBlock, list[Factor]], None] = lambda block, factors: None,
    ) -> ProgramAdapter | GeneralAdapter:
        """Return an adapter packed for the program, and call ``learn`` with its block of memory and low-rank factors.

        If the program cannot express the adapter, return it for the general runner.
        """
        with self._modules:
            try:
                effects = effects_on(self._lookup, self.interpreter.program)
            except UnsaidError as reason:
                if self.alone:
                    raise
                return GeneralAdapter(stored(), str(reason))
        packed, factors = self.interpreter.packed_of(effects)
        learn(packed.linears, factors)
        return self._placed(packed, self._prefix(effects))

    def _placed(self, packed: PackedEffects, prefix: list[KeysValues]) -> ProgramAdapter:
        """Move an adapter to the model's device, and count its bytes."""
        packed = packed if self.device.type == "cpu" else moved(packed, self.device)
        n_bytes = packed.linears.nbytes + bytes_of((packed.bottlenecks, packed.effects, prefix))
        return ProgramAdapter(packed, prefix, n_bytes)

    def load(self, version: str, adapter: ProgramAdapter | GeneralAdapter) -> None:
        if isinstance(adapter, GeneralAdapter):
            self._load_general(version, adapter)
            return
        front = adapter.prefix or self._front_of_prompt(adapter.packed.effects)
        if front:
            self.fronts[version] = front
        self.interpreter.take(version, adapter.packed)

    def _load_general(self, version: str, adapter: GeneralAdapter) -> None:
        folders = adapter.stored.folders
        with self._modules:
            if self.general is None:
                self.general = _own_code(self.model, self.cache.slots)
            for folder in folders:
                _require_weights(self.model, folder)
            self._lookup = Lookup(self.model)
            self.general.load(version, adapter.stored)
        _LOG.info(
            "%s has %s, which the program does not support: its requests take the general runner",
            ", ".join(map(str, folders)),
            adapter.reason,
        )

    def unload(self, version: str) -> None:
        by_program = version in self.interpreter.versions
        self.interpreter.drop(version)  # in any case: it may have been interrupted while it was taken in
        if self.general is not None and not by_program:
            with self._modules:
                self._lookup = Lookup(self.model)
                self.general.unload(version)
        self.fronts.pop(version, None)

    def discard(self, pages: Sequence[int]) -> None:
        self.cache.discard(pages)

    def release(self, request_ids: Sequence[Hashable]) -> None:
        if self.general is not None:
            self.general.release(request_ids)

    def keeps_apart(self, version: str | None) -> bool:
        return isinstance(self.general, OwnCacheRunner) and version in self.general.loaded

    def compute(self, plan: StepPlan, greedy: Collection[str]) -> Computed:
        if self.device.type != "cpu" and any(s.request_id not in greedy and wanted(s) for s in plan.sequences):
            greedy = ()  # then all tokens come back by one read
        if self.interpreter.program.page_states:
            greedy = ()  # a pass on states is not repeated if a logit is not finite
        # Reading a prefix runs the model itself once, which must not see what a pass through it has set.
        with self._modules if self.general is not None or isinstance(self.model, PeftModel) else nullcontext():
            general = frozenset[str]() if self.general is None else self.general.loaded
            others = tuple(s for s in plan.sequences if s.version in general)
            if not others or self.general is None:
                return self._by_program(plan.sequences, greedy)
            return self._by_both(self.general, plan, others)

    def _by_both(self, runner: OwnCodeRunner, plan: StepPlan, others: tuple[PlannedSequence, ...]) -> Computed:
        """Compute the logits and hidden states of a step. Those of ``others`` come from the general runner."""
        general = runner.loaded
        own = tuple(s for s in plan.sequences if s.version not in general)
        by_program = self._by_program(own, ()) if own else Computed((), {}, {})
        own_logits = list(by_program.blocks)
        [given], _, hidden = runner.compute(StepPlan(others), ())
        given = given.float()
        out = given.new_empty(sum(len(wanted(s)) for s in plan.sequences), given.shape[-1])
        bounds, at = [], 0
        for sequence in plan.sequences:
            bounds.append(range(at, at + len(wanted(sequence))))
            at += len(wanted(sequence))
        mine = [i for s, rows in zip(plan.sequences, bounds, strict=True) if s.version not in general for i in rows]
        theirs = [i for s, rows in zip(plan.sequences, bounds, strict=True) if s.version in general for i in rows]
        out[theirs] = given
        if own_logits:
            out[mine] = torch.cat(own_logits).float()
        return Computed([out], {}, by_program.hidden | hidden)

    def _by_program(self, sequences: Sequence[PlannedSequence], greedy: Collection[str]) -> Computed:
        pieces = [_piece(sequence, greedy) for sequence in sequences]
        fronts = [self._front_rows(s) for s in sequences if s.n_front_there < s.n_front and s.version in self.fronts]
        ids = whole_numbers([token for s in sequences for token in s.tokens])
        step = step_on_host(pieces, self.cache)
        step.segments = self.interpreter.segments(step)
        step, (ids, fronts) = sent(step, self.device, (ids, fronts))
        for front in fronts:
            self._put_front(*front)
        logits = self.interpreter.rows(step, ids)
        tokens = step.tokens.tolist() if len(step.tokens) else []
        if -1 in tokens:  # a logit is not finite: the sampler is to see all of them
            return self._by_program(sequences, ())
        found = iter(tokens)
        picked = {s.request_id: list(islice(found, p.n_picked)) for s, p in zip(sequences, pieces, strict=True)}
        likeliest = {id: tokens for id, tokens in picked.items() if tokens}
        hidden = by_request(sequences, logits.hidden().cpu()) if len(step.read) else {}
        return Computed(logits.blocks(), likeliest, hidden)

    def _front_rows(self, sequence: PlannedSequence) -> tuple[str | None, int, Any]:
        """Return the version of a sequence, its first missing virtual token, and the page slots from there on."""
        first = sequence.n_front_there
        stretch = Stretch(sequence.pages, first, sequence.n_front - first)
        return sequence.version, first, self.cache.rows([stretch])

    def _put_front(self, version: str | None, first: int, rows: Any) -> None:
        for layer, (keys, values) in enumerate(self.fronts[version or ""]):
            self.cache.append(layer, keys[first:], values[first:], rows)

    def _prefix(self, effects: Effects) -> list[KeysValues]:
        """Return a prefix's own keys and values, by layer."""
        if effects.front is None or isinstance(effects.front, PromptDelta):
            return []
        own = [(record.k, record.v) for record in effects.front]
        effects.front = None
        return [(k.to(self.device, self.model.dtype), v.to(self.device, self.model.dtype)) for k, v in own]

    def _front_of_prompt(self, effects: Effects) -> list[KeysValues]:
        """Return the keys and values that the base computes for a prompt's virtual tokens, by layer."""
        front, dtype, device = effects.front, self.model.dtype, self.device
        if not isinstance(front, PromptDelta):
            return []
        given = front.embeddings.to(device, dtype)
        cache = make_cache(self.interpreter.program, 1, _page_of(len(given)), dtype, device)
        step = step_of([Piece(Stretch((0,), 0, len(given)))], cache, device)
        step.written = []
        self.interpreter.run(step, given)
        return step.written


def _piece(sequence: PlannedSequence, greedy: Collection[str]) -> Piece:
    stretch, picks = Stretch(sequence.pages, sequence.start, len(sequence.tokens)), sequence.request_id in greedy
    kept, n_picked = ((), 1 + sequence.n_drafted) if picks else (wanted(sequence), 0)
    return Piece(stretch, sequence.version, kept, n_picked, read(sequence))


def _page_of(n: int) -> int:
    """Return the smallest page size, in tokens, that is at least n and a multiple of `UNIT`."""
    return -(-n // UNIT) * UNIT


def _own_code(model: PreTrainedModel, slots: Callable[[], SlotStore]) -> OwnCodeRunner:
    """Return a runner of the model's own code in the program's pages.

    If its layers keep more than keys and values, each sequence has a cache of transformers' own.
    """
    with base_alone(model):
        try:
            require_pageable(model)
        except TargetError as error:
            way = proved_way(model)
            _LOG.warning(
                "%s: %s. A request with an adapter that its program does not support takes a pass of its own, without "
                "prefix cache", type(model).__name__, error,
            )  # fmt: skip
            return OwnCacheRunner(model, way)
    return GeneralRunner(model, slots())


def _require_weights(model: PreTrainedModel, folder: Path) -> None:
    """Raise TargetError if an adapter trains a whole weight of which the model keeps only a packed copy."""
    copied = plan_of(look_at(model), read_config(folder), fresh=False).copied
    gone = [path for path, names in copied.items() if "weight" in names and is_packed(model.get_submodule(path))]
    if gone:
        raise TargetError(
            f"the adapter in {folder} has a weight of its own at {gone[0]}, and other parts that the program of "
            f"{type(model).__name__} does not support: start with general_runner=True"
        )


def proved(model: PreTrainedModel, n_positions: int, *, give_up: bool = False) -> Interpreter:
    """Return the program of a model on packed weights, verified on two short sequences.

    They are at the start and the end of the context; each runs whole and in two chunks. ``give_up``: the model's own
    weights are freed after packing.

    Raises DescriptionError with the part that has no operation, or with the difference of the logits from the model's
    own. In both cases the model has its own weights again.
    """
    decoder = describe(model)
    program = compile_program(decoder, n_positions)
    windows = [part.window for part in program.attentions if part.window is not None]
    n = min(max([13, *(window + 5 for window in windows if window <= _LONGEST_WINDOW)]), n_positions)
    starts = dict.fromkeys((0, n_positions - n))
    ids = {
        first: (torch.arange(n, device=model.device) * 7 + 3 * first) % program.embedding.n_tokens for first in starts
    }
    waiting_for("computing two short sequences by the model's own code, to compare")
    own = {first: _own_logits(model, ids[first], first) for first in starts}
    allowed = TOLERANCE.get(model.dtype, TOLERANCE[torch.float32])
    if decoder.listed and model.dtype.itemsize == 2:
        allowed *= _LISTED  # their descriptions are tested by values; this looks for what is far off
    # Weights are given up before the proof, so that no second model is in memory.
    packed = _packed(model, program, give_up=give_up)
    interpreter = Interpreter(model, program, packed, _stacks(model, program, give_up=give_up))
    waiting_for("comparing the program with the model's own code")
    problem = next(
        (p for first in starts if (p := _problem(interpreter, ids[first], first, own[first], allowed))), None
    )
    if problem is not None:
        if give_up:
            unpack(model)
        raise DescriptionError(problem)
    if give_up:
        give_back(model)
    return interpreter


def _problem(interpreter: Interpreter, ids: Tensor, first: int, own: Tensor, allowed: float) -> str | None:
    """Return, in words, how a sequence's logits differ from the model's ``own``; None if they agree."""
    n = len(ids)
    for cuts in ((n,), (n - 4, 4)):
        error = _difference(_in_chunks(interpreter, ids, cuts, first), own, _rows_together(interpreter, n))
        if not error <= allowed:
            return (
                f"its logits at positions {first} to {first + n - 1} are {error:.1e} away from the model's own "
                f"(allowed {allowed:.0e})"
            )
    return None


_LISTED = 3
_LONGEST_WINDOW = 512  # that the proof looks beyond: for longer ones it would take too long


def _packed(model: PreTrainedModel, program: Program, *, give_up: bool) -> dict[tuple[str, ...], PackedGroup]:
    """Pack the weights of each product that can be packed, one group after another, so that memory holds no second
    model.
    """
    found = {}
    for number, linears in enumerate(program.groups, start=1):
        waiting_for(f"packing the base: {number} of {len(program.groups)} products")
        paths = tuple(linear.path for linear in linears)
        group = pack_group(model, paths, give_up=give_up)
        if group is not None:
            found[paths] = group
    return found


def _stacks(model: PreTrainedModel, program: Program, *, give_up: bool) -> dict[tuple[str, ...], Stacks]:
    """Pack the experts of each mixture that can be packed, as `_packed` does."""
    found = {}
    for number, stacks in enumerate(program.stacks, start=1):
        waiting_for(f"packing the experts: {number} of {len(program.stacks)} mixtures")
        paths = tuple(stack.path for stack in stacks)
        packed = pack_experts(model, paths, give_up=give_up)
        if packed is not None:
            found[paths] = packed
    return found


def _rows_together(interpreter: Interpreter, n: int) -> int:
    """Return the number of consecutive rows whose median error is compared with the tolerance.

    It is all ``n`` rows for a mixture of experts in 16 bits. There rounding may choose the other of two experts with
    nearly equal scores. Errors of such a row, and of rows that attend to it, do not show that the program is wrong.
    """
    return n if interpreter.program.stacks and interpreter.dtype.itemsize == 2 else 5


def _difference(found: Tensor, own: Tensor, together: int) -> float:
    """Return the largest median error of a group of rows; a group is ``together`` consecutive rows of logits.

    A row's error is the norm of its difference from ``own``, relative to the norm of ``own``. Medians are used because
    a single row says little in 16 bits. For example, all tokens attend to the first token, and its row is off by a
    fifth from float32 in the model's own pass.
    """
    each = (found - own).norm(dim=1) / own.norm(dim=1).clamp_min(1e-30)
    return max(float(rows.median()) for rows in each.split(together))


def _own_logits(model: PreTrainedModel, ids: Tensor, first: int) -> Tensor:
    positions = torch.arange(first, first + len(ids), device=model.device)[None]
    with evaluation(model), torch.no_grad():
        logits: Tensor = model(input_ids=ids[None], position_ids=positions, use_cache=False).logits[0]
    return logits.float()


def _in_chunks(interpreter: Interpreter, ids: Tensor, cuts: Sequence[int], first_position: int) -> Tensor:
    cache, found, at = make_cache(interpreter.program, 1, _page_of(len(ids)), interpreter.dtype, ids.device), [], 0
    for n in cuts:
        piece = Piece(Stretch((0,), at, n), None, range(n))
        found.append(interpreter.run(step_of([piece], cache, ids.device, first_position), ids[at : at + n]))
        at += n
    return torch.cat(found)
