"""AdaMSS: rows of W in clusters, each with a low-rank pair, ``W + Σₖ Bₖ Aₖ V`` (NeurIPS 2025,
neurips.cc/virtual/2025/poster/119606).

V (r, i) holds the first right singular vectors of the weight, with the bias as one more column. The rows of the matrix
of left singular vectors are clustered, and Bₖ changes only the weight's rows in cluster k. So the update is a low-rank
pair, whose rank is the sum of the clusters' ranks, and a bias.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.known import Known
from veneer.contract.needed import needed_weight
from veneer.contract.packing import Packing
from veneer.contract.patterns import below_one
from veneer.contract.peft_fields import PeftFields
from veneer.contract.seeds import no_seeds
from veneer.contract.targets import FamilyTargets
from veneer.contract.training import Training
from veneer.errors import ConfigError
from veneer.ops.traced import is_tracing
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite

_V, _ORDER = "adamss_newB", "order"
_TRAINED = ("adamss_A", "adamss_B")
_KMEANS_SEED, _KMEANS_STEPS = 123456789, 10  # PEFT's
_LEAST_ALIKE = 0.25  # another weight has about 1 / i, this one with codes of 4 bits above 0.3


@dataclass(frozen=True, kw_only=True)
class AdamssConfig(LinearMethod):
    """Settings of AdaMSS, with the names that PEFT gives them.

    ``r`` singular vectors are taken, their rows fall into ``num_subspaces`` clusters, and each cluster has a pair of
    rank ``subspace_rank`` at most. ``use_dynamic_rank``: a cluster's rank is the number of its singular values whose
    square is above ``svd_threshold`` times the largest's. ``random_seed`` is that of the decomposition. No file holds
    the clusters: they are found again in the base's weights, whose V must equal the file's. ``init_weights``:
    "orthogonal" starts B at zero; None (or False) draws it at random. ``use_asa`` freezes clusters in training until
    the ``asa_target_subspaces`` most important are left. Clusters are frozen every ``mask_interval`` steps from step
    ``init_warmup`` to step ``final_warmup``. ``asa_schedule_exponent`` is the power of the time left with which the
    number of trained clusters falls. ``asa_importance_beta`` and ``asa_uncertainty_beta`` are the decay rates of the
    averages of importance and of its uncertainty. ``stored`` (the shapes of a file's parameters) is filled in when a
    file is read. Difference from PEFT: the rank of a pair is r if ``subspace_rank`` is above it. PEFT's forward pass
    fails there.
    """

    peft_type: ClassVar[str] = "ADAMSS"
    headline: ClassVar[tuple[str, ...]] = ("r", "num_subspaces", "subspace_rank", "target_modules")
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules",))
    inert: ClassVar[frozenset[str]] = frozenset(
        {"subspace_rank", "init_weights", "use_asa", "asa_target_subspaces", "init_warmup", "final_warmup"}
        | {"mask_interval", "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"}
        | {"use_dynamic_rank", "svd_threshold", "stored"}
    )

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: Literal["orthogonal"] | bool | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0
    stored: Mapping[str, Mapping[str, Collection[int]]] | None = field(default=None, metadata={"on_disk": False})

    def problems(self) -> list[str]:
        counts = {name: getattr(self, name) for name in ("r", "num_subspaces", "subspace_rank")}
        found = super().problems() + no_seeds({"random_seed": self.random_seed})
        if self.init_weights is True:
            found.append("init_weights=True must be 'orthogonal', or None for a random start")
        if not self.use_asa:
            return found + below_one(counts)
        found += below_one(counts | {name: getattr(self, name) for name in ("mask_interval", "asa_target_subspaces")})
        if self.init_warmup >= self.final_warmup:
            found.append(f"init_warmup={self.init_warmup!r} must be below final_warmup={self.final_warmup!r}")
        if self.asa_schedule_exponent <= 0:
            found.append(f"asa_schedule_exponent={self.asa_schedule_exponent!r} must be above 0")
        return found

    @property
    def largest_rank(self) -> int:
        return self.num_subspaces * min(self.subspace_rank, self.r)

    @property
    def reads_weight(self) -> bool:
        return True

    @property
    def packing(self) -> Packing:
        return _Vectors(fixed=(_V,), config=self)

    @property
    def training(self) -> SubspaceTraining | None:
        return SubspaceTraining(self) if self.use_asa else None

    @property
    def samples(self) -> tuple[LinearSite, ...]:
        return tuple(replace(site, out_features=self.num_subspaces) for site in super().samples)

    def for_sites(self, sites: Sequence[LinearSite], known: Known) -> Self:
        return replace(self, stored=known.shapes or None)

    def n_clusters(self, site: LinearSite) -> int:
        """Return the number of clusters of a layer, at most its number of outputs."""
        return min(self.num_subspaces, site.out_features)

    def shapes(self, site: LinearSite) -> Shapes:
        stored = {name: tuple(shape) for name, shape in (self.stored or {}).get(site.name, {}).items()}
        o, n, width = site.out_features, self.n_clusters(site), site.in_features + site.has_bias
        if _has_values(site):
            parts = self._parts(site)
            r, sizes = len(parts.v), [(len(rows), rank) for rows, rank in zip(parts.rows, parts.ranks, strict=True)]
        elif _fit(stored, site):
            return stored
        else:  # of a plan, before weights have values: clusters of one size
            ends = [o * (k + 1) // n for k in range(n)]
            lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            r = min(self.r, o, width)
            sizes = [(length, min(length, r, self.subspace_rank)) for length in lengths]
        found: Shapes = {_V: (r, width)}
        found |= {_a(k): (rank, r) for k, (_, rank) in enumerate(sizes)}
        return found | {_b(k): size for k, size in enumerate(sizes)}

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        n = range(self.n_clusters(site))
        return {_V: _V} | {_a(k): f"adamss_A.{k}" for k in n} | {_b(k): f"adamss_B.{k}" for k in n}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        if not _has_values(site):
            return {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        u, parts = self._decomposed(site)
        found = {_V: parts.v.cpu()}
        with _drawing(generator):  # in PEFT's order
            for k, (rows, rank) in enumerate(zip(parts.rows, parts.ranks, strict=True)):
                found[_a(k)] = _start(u[rows], rank).cpu()
                shape = len(rows), rank
                found[_b(k)] = torch.zeros(shape) if self.init_weights else 0.01 * torch.randn(shape)
        return found

    def derived(self, site: LinearSite, params: Params) -> dict[str, Tensor]:
        """Return, for each row of the weight, its position if the rows of all clusters are listed one cluster after
        another.
        """
        if is_tracing():  # of a plan, before weights have values
            return {_ORDER: torch.arange(site.out_features)}
        order = torch.cat(self._parts(site).rows).argsort()
        site.found.pop(self._key, None)  # it is not asked for again
        return {_ORDER: order}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        order = (params if _ORDER in params else self.derived(site, params))[_ORDER]
        v, clusters = params[_V], range(self.n_clusters(site))
        a = torch.cat([params[_a(k)] for k in clusters]) @ v
        diagonal: Tensor = torch.block_diag(*(params[_b(k)] for k in clusters))  # type: ignore[no-untyped-call]
        b = diagonal.index_select(0, order.to(v.device))
        record = LinearDelta.pair(a[:, : site.in_features], b)
        if v.shape[1] == site.in_features:
            return record
        added = b @ a[:, -1]
        return replace(record, bias=added if site.bias is None else site.bias + added)

    def decomposed(self, site: LinearSite) -> tuple[Float[Tensor, "o r"], Float[Tensor, " r"], Float[Tensor, "r i"]]:
        """Return the first left singular vectors, singular values and right singular vectors of a layer's weight."""
        w = needed_weight(site, "AdaMSS").dense(torch.float32).detach()
        if site.bias is not None:
            w = torch.cat([w, site.bias.detach().to(w.device, w.dtype)[:, None]], dim=1)
        device = w.device
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
            torch.manual_seed(self.random_seed)
            u, s, v = torch.svd_lowrank(w, q=min(self.r, *w.shape), niter=2)
        return u, s, v.T.contiguous()

    def _parts(self, site: LinearSite) -> WeightParts:
        """Return the decomposition of a layer's weight. Computing it takes long, so the site caches the result until
        `derived` is called.
        """
        kept = site.found.get(self._key)
        return kept if isinstance(kept, WeightParts) else self._decomposed(site)[1]

    def _decomposed(self, site: LinearSite) -> tuple[Float[Tensor, "o r"], WeightParts]:
        """Decompose a layer's weight. Return the left singular vectors, and the other parts, which the site caches."""
        u, s, v = self.decomposed(site)
        rows = clustered(u, self.n_clusters(site), site.name)
        parts = WeightParts(s, v, rows, [self._rank(u[each]) for each in rows])
        site.found[self._key] = parts
        return u, parts

    @property
    def _key(self) -> Hashable:
        """Return the settings that determine the decomposition of a weight, as a key of a cache."""
        ranks = self.subspace_rank, self.use_dynamic_rank, self.svd_threshold
        return type(self), self.r, self.num_subspaces, self.random_seed, ranks

    def _rank(self, u: Float[Tensor, "n r"]) -> int:
        """Return the rank of a cluster that has these rows of U."""
        most = min(len(u), u.shape[1], self.subspace_rank)
        if not self.use_dynamic_rank:
            return most
        values = torch.linalg.svdvals(u) ** 2
        return max(1, min(most, int((values > self.svd_threshold * values[0]).sum())))


@dataclass(frozen=True, kw_only=True)
class _Vectors(Packing):
    """Packing that compares V in the file with V of the base's weight, because clusters of another weight may have the
    same shapes by chance.
    """

    config: AdamssConfig

    def problems(self, site: LinearSite, params: Params) -> list[str]:
        if _V not in params or not _has_values(site):
            return []
        parts = self.config._parts(site)
        cosines = (params[_V].to(parts.v) * parts.v).sum(dim=1)
        alike = float((parts.s * cosines).square().sum() / parts.s.square().sum())
        if not alike < _LEAST_ALIKE:
            return []
        return [
            f"{_V} of {site.name} agrees only to {alike:.0%} with the singular vectors of this base's weight: load the "
            "adapter on the base that it was trained on"
        ]


@dataclass(frozen=True)
class WeightParts:
    """Singular values ``s`` and right singular vectors ``v`` of a weight, the ``rows`` of its clusters, and the
    clusters' ranks.
    """

    s: Float[Tensor, " r"]
    v: Float[Tensor, "r i"]
    rows: list[Int[Tensor, " n"]]
    ranks: list[int]


def clustered(u: Float[Tensor, "o r"], n: int, name: str) -> list[Int[Tensor, " n"]]:
    """Return the indices of the rows in each of n clusters, found by k-means as PEFT finds them.

    ``name`` is that of the layer, for messages. Raises ConfigError without scikit-learn, and if k-means finds fewer
    clusters.
    """
    try:
        from sklearn.cluster import KMeans  # optional, and slow to import
    except ImportError as error:
        raise ConfigError(
            "AdaMSS finds its clusters with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    means = KMeans(n_clusters=n, init="random", n_init=1, max_iter=_KMEANS_STEPS, random_state=_KMEANS_SEED)
    index = torch.from_numpy(means.fit_predict(u.cpu().numpy())).to(u.device)
    found = [torch.where(index == k)[0] for k in range(n)]
    n_full = sum(len(rows) > 0 for rows in found)
    if n_full < n:
        raise ConfigError(f"the rows of {name} fall into {n_full} clusters: give at most num_subspaces={n_full}")
    return found


def _start(u: Float[Tensor, "n r"], rank: int) -> Float[Tensor, "rank r"]:
    """Return the initial A of a cluster: an orthonormal basis of the main directions of its rows ``u``."""
    left, _, _ = torch.svd_lowrank(u @ u.T, q=rank, niter=2)
    basis: Tensor = torch.linalg.qr(u.T @ left).Q
    return basis.T.contiguous()


@contextmanager
def _drawing(generator: torch.Generator | None) -> Iterator[None]:
    """Enter a context in which torch's global generator is seeded from ``generator``, because the randomized
    decomposition reads the global one.

    If ``generator`` is None, nothing changes.
    """
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def _has_values(site: LinearSite) -> bool:
    return site.weight is not None and not is_tracing()


def _fit(stored: Mapping[str, tuple[int, ...]], site: LinearSite) -> bool:
    """Return True if the shapes in a file are possible for clusters of this layer's rows."""
    if _V not in stored or any(len(shape) != 2 for shape in stored.values()):
        return False
    (r, width), n = stored[_V], (len(stored) - 1) // 2
    if any(_a(k) not in stored or _b(k) not in stored for k in range(n)):
        return False
    ranks = all(stored[_a(k)] == (stored[_b(k)][1], r) for k in range(n))
    rows = sum(stored[_b(k)][0] for k in range(n))
    return ranks and rows == site.out_features and width == site.in_features + site.has_bias


def _a(k: int) -> str:
    return f"adamss_A_{k}"


def _b(k: int) -> str:
    return f"adamss_B_{k}"


@dataclass(frozen=True)
class SubspaceTraining(Training):
    """AdaMSS during a training run with ``use_asa``: clusters are frozen one after another."""

    config: AdamssConfig

    def schedule(self, layers: Mapping[str, Params]) -> SubspaceSchedule:
        return SubspaceSchedule(self.config, layers)


class SubspaceSchedule:
    """Adaptive subspace allocation: it freezes the least important clusters of all layers.

    ``layers`` are the parameters of each layer by its path. After each backward pass and optimizer step, before
    gradients are set to zero, call `step`. Between ``init_warmup`` and ``final_warmup``, the importance ``|w g|`` of
    each number and its uncertainty are averaged. Every ``mask_interval`` steps, all clusters but the best are frozen.
    The number of trained clusters falls to ``asa_target_subspaces``, and the averages start again.
    """

    def __init__(self, config: AdamssConfig, layers: Mapping[str, Params]) -> None:
        self.config, self.layers = config, layers
        self.total = sum(name.startswith(_TRAINED[1]) for params in layers.values() for name in params)
        self.importance: dict[tuple[str, str], Tensor] = {}
        self.uncertainty: dict[tuple[str, str], Tensor] = {}

    def target(self, step: int) -> int:
        """Return the number of clusters that are still trained after a step."""
        first, last = self.config.init_warmup, self.config.final_warmup
        left, least = 1 - (step - first) / (last - first), self.config.asa_target_subspaces
        return int(least + (self.total - least) * left**self.config.asa_schedule_exponent)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Score the clusters. If a freezing is due at this step, freeze the least important ones."""
        if not self.config.init_warmup <= step <= self.config.final_warmup:
            return
        for path, name, value in self._trained():
            if value.grad is not None:
                self._observe((path, name), (value * value.grad).abs())
        if step % self.config.mask_interval == 0:
            self._freeze(self.target(step))
            self.importance, self.uncertainty = {}, {}

    def state(self) -> dict[str, Tensor]:
        """Return the averages, and whether each parameter is trained, by name."""
        averages = {"importance": self.importance, "uncertainty": self.uncertainty}
        found = {f"{what}/{p}/{n}": value for what, of in averages.items() for (p, n), value in of.items()}
        return found | {f"trained/{p}/{n}": torch.tensor(x.requires_grad) for p, n, x in self._trained()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`."""
        for key, value in state.items():
            what, _, rest = key.partition("/")
            path, _, name = rest.rpartition("/")
            own = self.layers[path][name]
            if what == "trained":
                own.requires_grad_(bool(value))
            else:
                of = self.importance if what == "importance" else self.uncertainty
                of[path, name] = value.to(own.device)

    def _trained(self) -> Iterator[tuple[str, str, Tensor]]:
        for path, params in self.layers.items():
            yield from ((path, name, value) for name, value in params.items() if name.startswith(_TRAINED))

    def _observe(self, key: tuple[str, str], now: Tensor) -> None:
        b1, b2, zero = self.config.asa_importance_beta, self.config.asa_uncertainty_beta, torch.zeros_like(now)
        mean = self.importance.get(key, zero)
        self.uncertainty[key] = b2 * self.uncertainty.get(key, zero) + (1 - b2) * (now - mean).abs()
        self.importance[key] = b1 * mean + (1 - b1) * now

    def _freeze(self, n: int) -> None:
        """Freeze all scored clusters except the best n. As in PEFT, a cluster that ties with the n-th is frozen too."""
        pairs = [(path, name, name.replace("_A_", "_B_")) for path, name in self.importance if "_A_" in name]
        pairs = [(path, a, b) for path, a, b in pairs if (path, b) in self.importance]
        if not pairs or n >= len(pairs):
            return
        score = {key: (self.importance[key] * self.uncertainty[key]).mean() for key in self.importance}
        scores = torch.stack([score[path, a] + score[path, b] for path, a, b in pairs])
        least = scores.topk(n).values[-1] if n else torch.tensor(torch.inf)
        for (path, *names), own in zip(pairs, scores, strict=True):
            if own > least:
                continue
            for name in names:
                self.layers[path][name].requires_grad_(False)
                self.layers[path][name].grad = None
