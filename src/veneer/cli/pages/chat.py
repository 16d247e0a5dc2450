"""``veneer chat``: a conversation in the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.cli.arguments import require_model
from veneer.cli.pages import options
from veneer.cli.work import verb
from veneer.store.adapter.folder import require_adapter, require_whole


@dataclass(frozen=True, kw_only=True)
class ChatArguments:
    """Talk to a model. /new forgets the conversation; /help shows the commands. Ctrl-C stops an answer; Ctrl-D or /exit
    leaves.

    Example: veneer chat smollm2-135m-instruct --adapter runs/first/adapter
    """

    model: options.Model
    adapter: options.Adapter = None
    system: options.System = None
    max_new_tokens: options.MaxNewTokens = 512
    temperature: options.Temperature = 0.7
    top_p: options.TopP = 0.9
    top_k: options.TopK = 0
    seed: options.Seed = None
    load_in_4bit: options.FourBit = False
    dtype: options.Dtype = "auto"

    def __post_init__(self) -> None:
        require_adapter(self.adapter)
        require_model(self.model)
        require_whole(self.adapter)


chat = verb(ChatArguments, "veneer.cli.chat", "chat", hears=False)
