"""Write a reply token by token, so that several replies can take turns on one loaded model.

A reply is a generator that does one forward step per `next`; whoever calls `next` decides whose
turn it is. The state between steps (keys and values of attention, convolution and recurrent
state of each delta net) is the cache that the model itself returns
(transformers.cache_utils.DynamicCache, one per reply).
Greedy replies equal `model.generate(do_sample=False)`; tests/workers/test_chat.py compares them.
Not covered: batches, beams, penalties, speculative decoding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from studio.errors import EngineError

# Longest piece of a prompt in one step, so that a long prompt does not hold up other replies.
# A multiple of 64, the chunk of torch_chunk_gated_delta_rule: the sums stay the same.
PREFILL_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: Share of probability to draw from, above 0 and at most 1.
        top_k: Number of tokens to draw from; 0 means all.
        seed: None draws differently each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


class Voice:
    """A model that can be asked: a base, a base with its Adapter, or a merged model.

    Two voices may share one loaded model, one with and one without the Adapter; so only one
    thread may step at a time.

    Args:
        model: In evaluation mode.
        with_adapter: Whether the Adapter of a PeftModel speaks.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, with_adapter: bool = False) -> None:
        self._model = model
        self._with_adapter = with_adapter
        self._layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self.device: torch.device = model.device

    def step(self, tokens: Sequence[int], cache: Cache | None) -> tuple[torch.Tensor, Cache]:
        """Read tokens.

        Args:
            tokens: What comes next in the reply.
            cache: What `step` returned for the tokens before; None at the beginning.

        Returns:
            Logits of the next token (vocabulary), float32, and the cache with these tokens.

        Raises:
            EngineError: The logits are not finite.
        """
        for layer in self._layers:
            # Not PeftModel.disable_adapter: it inspects every module of the model at each use.
            if layer.disable_adapters == self._with_adapter:
                layer.enable_adapters(self._with_adapter)
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=self.device)
            output = self._model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            logits: torch.Tensor = output.logits[0, -1].float()
            if not torch.isfinite(logits).all():
                raise EngineError(
                    "The model's logits are not finite, so no token can be chosen.",
                    "The weights are damaged or the training diverged; look at the run's loss.",
                )
        return logits, output.past_key_values


class Chooser:
    """Draws tokens as transformers' generate does, from its own seeded generator.

    Args:
        sampling: How to draw.
        device: Where the logits live.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._is_greedy = sampling.temperature == 0
        self._warpers = LogitsProcessorList()
        if not self._is_greedy:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))
        self._generator = torch.Generator(device=device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor) -> int:
        """Return a token for logits of shape (vocabulary)."""
        if self._is_greedy:
            return int(logits.argmax())
        no_ids = torch.empty((1, 0), dtype=torch.long)  # these warpers do not read them
        scores = self._warpers(
            cast(torch.LongTensor, no_ids), cast(torch.FloatTensor, logits[None])
        )
        probabilities = scores.softmax(-1)
        return int(torch.multinomial(probabilities[0], 1, generator=self._generator))


def decode(
    voice: Voice,
    prompt: Sequence[int],
    chooser: Chooser,
    *,
    stop_ids: frozenset[int],
    max_tokens: int,
    prefill_tokens: int = PREFILL_TOKENS,
) -> Iterator[int | None]:
    """Write a reply.

    Args:
        voice: Who is asked.
        prompt: At least one token.
        chooser: Draws the tokens.
        stop_ids: Tokens that end the reply.
        max_tokens: Most tokens of the reply, at least 1.
        prefill_tokens: Longest piece of the prompt in one step.

    Yields:
        After each forward step the token that it gave, the stop token included; None after a
        piece of a long prompt that gave none.
    """
    cache: Cache | None = None
    last = (len(prompt) - 1) // prefill_tokens * prefill_tokens
    for start in range(0, last, prefill_tokens):
        _, cache = voice.step(prompt[start : start + prefill_tokens], cache)
        yield None
    pending = prompt[last:]
    for _ in range(max_tokens):
        logits, cache = voice.step(pending, cache)
        token = chooser.choose(logits)
        yield token
        if token in stop_ids:
            return
        pending = [token]
