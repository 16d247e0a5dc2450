"""Counters of a run; every checkpoint holds them, so that a resumed run logs the same numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Progress:
    """Counters of a training, summed over optimizer steps. Losses are in nats for each trained token.

    Those with ``window`` begin at the last log line. ``seconds`` is the time of the training before the checkpoint from
    which this process resumed.
    """

    loss: float = 0.0
    window_loss: float = 0.0
    window_from_step: int = 0
    window_right: int = 0
    window_trained: int = 0
    n_tokens: int = 0
    seconds: float = 0.0

    def add_loss(self, loss: float) -> None:
        """Count the loss of one micro-batch, already divided by the trained tokens of its whole step."""
        self.loss += loss
        self.window_loss += loss

    def add_tokens(self, n_tokens: int, n_trained: int, n_right: int) -> None:
        """Count the tokens of one micro-batch: all except padding, those trained, and those predicted right."""
        self.n_tokens += n_tokens
        self.window_trained += n_trained
        self.window_right += n_right

    def loss_of_window(self, step: int) -> float:
        """Return the mean loss of the steps since the last log line, up to ``step``."""
        return self.window_loss / max(step - self.window_from_step, 1)

    def close_window(self, step: int) -> dict[str, float]:
        """Return the values of a log line, and start the next window."""
        values = {"loss": self.loss_of_window(step)}
        if self.n_tokens:
            values["mean_token_accuracy"] = self.window_right / max(self.window_trained, 1)
            values["num_tokens"] = float(self.n_tokens)
        self.window_loss, self.window_from_step, self.window_right, self.window_trained = 0.0, step, 0, 0
        return values

    def as_dict(self) -> dict[str, Any]:
        """Return the counters for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """Return the counters of a checkpoint; missing ones start at zero."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
