"""Who can be asked in one Chat: the base, and beside it what was trained on it.

All work on models and tokenizer runs in one thread: replies take turns token by token, in the
order in which they ask, and neither the Adapter's switch nor the tokenizer needs another lock.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from studio.disk import Home
from studio.domain.chat_template import render
from studio.domain.openai_messages import from_openai
from studio.domain.orders import ChatOrder
from studio.domain.strict_json import RecordError
from studio.errors import EngineError, InputError
from workers.decode import Chooser, Sampling, Voice, decode
from workers.engine.lora import load_adapter
from workers.engine.model import Method, find_base, load_base, load_tokenizer
from workers.engine.quantized_cache import QuantizedCache
from workers.process import best_device
from workers.reply import THINK_START, Piece, pieces

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What one request asks.

    Attributes:
        speaker: `base` or `tuned`.
        messages: OpenAI messages, as they came.
        tools: Function schemas offered to the model.
        stop: Texts that end the reply.
        max_tokens: Most tokens of the reply; the model's context may allow fewer.
    """

    speaker: str
    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]]
    enable_thinking: bool
    sampling: Sampling
    stop: Sequence[str]
    max_tokens: int


class Speakers:
    """Loaded models that answer questions.

    Args:
        voices: By name.
        tokenizer: Of the base.
        generation: What the authors of the base publish about asking it.
        context_tokens: Most tokens of prompt and reply together.
    """

    def __init__(
        self,
        voices: dict[str, Voice],
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationConfig,
        context_tokens: int,
    ) -> None:
        self._voices = voices
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens
        self._stop_ids = _stop_ids(tokenizer, generation)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.usual_sampling = _usual_sampling(generation)
        self.num_replies = 0  # under way
        self._is_closing = False

    @property
    def names(self) -> tuple[str, ...]:
        """Who can be asked."""
        return tuple(self._voices)

    def close(self) -> None:
        """End every reply under way at its next step; may be called in a signal handler."""
        self._is_closing = True

    async def read(self, question: Question) -> list[int]:
        """Return the prompt in tokens.

        Raises:
            InputError: The messages are wrong, or the prompt leaves no room for a reply.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._read, question)

    async def answer(self, question: Question, prompt: list[int]) -> AsyncGenerator[Piece]:
        """Yield the reply, one Piece per step of the model.

        A caller that stops iterating frees the model after the step under way.

        Raises:
            EngineError: The model gives no token, or `close` was called.
        """
        loop = asyncio.get_running_loop()
        self.num_replies += 1
        try:
            reply = await loop.run_in_executor(self._thread, self._begin, question, prompt)
            while (
                piece := await loop.run_in_executor(self._thread, next, reply, None)
            ) is not None:
                if self._is_closing:
                    raise EngineError("The Chat was closed while it answered.", "Open it again.")
                yield piece
        finally:
            self.num_replies -= 1

    def _read(self, question: Question) -> list[int]:
        try:
            conversation = from_openai({"messages": question.messages, "tools": question.tools})
        except RecordError as error:
            raise InputError(f"The messages are wrong: {error}.", "Correct that place.") from error
        text = render(
            str(self._tokenizer.chat_template),
            conversation.template_messages(),
            tools=conversation.tools,
            add_generation_prompt=True,
            enable_thinking=question.enable_thinking,
        )
        prompt: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        if len(prompt) >= self._context_tokens:
            raise InputError(
                f"The prompt has {len(prompt)} tokens, but the context of the model holds "
                f"{self._context_tokens} for prompt and reply together.",
                "Shorten the conversation, or begin a new one.",
            )
        return prompt

    def _begin(self, question: Question, prompt: list[int]) -> Iterator[Piece]:
        voice = self._voices[question.speaker]
        tokens = decode(
            voice,
            prompt,
            Chooser(question.sampling, voice.device),
            stop_ids=self._stop_ids,
            max_tokens=min(question.max_tokens, self._context_tokens - len(prompt)),
        )
        end_of_prompt = self._decode(prompt[-8:]).rstrip()
        return pieces(
            tokens,
            self._decode,
            stop_ids=self._stop_ids,
            stop=question.stop,
            is_thinking=end_of_prompt.endswith(THINK_START),
        )

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def load_speakers(order: ChatOrder, home: Home) -> Speakers:
    """Load what a Chat asks for: the base once, with the Adapter on it or the Merge beside it.

    Raises:
        InputError: The base model is wrong.
        EngineError: Something cannot be read, or the Adapter does not fit the base.
    """
    folder = find_base(order.model, home)
    tokenizer = load_tokenizer(folder)
    precision: Method = "lora" if order.method == "full" else order.method
    cache = QuantizedCache(folder=home.quantized)
    base = load_base(folder, method=precision, device=best_device(), cache=cache)
    voices = {BASE: Voice(base)}
    if order.adapter is not None:
        adapted = load_adapter(base, Path(order.adapter))
        voices = {BASE: Voice(adapted), TUNED: Voice(adapted, with_adapter=True)}
    elif order.merged is not None:
        # In 16 bits, as whoever takes the merged folder away will load it.
        merged = load_base(Path(order.merged), method="lora", device=best_device())
        voices[TUNED] = Voice(merged)
    generation = base.generation_config or GenerationConfig()  # type: ignore[no-untyped-call]
    return Speakers(voices, tokenizer, generation, _context_tokens(base))


def _context_tokens(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().max_position_embeddings)


def _stop_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> frozenset[int]:
    ends = generation.eos_token_id
    published = ends if isinstance(ends, list) else [ends]
    return frozenset(int(i) for i in [*published, tokenizer.eos_token_id] if i is not None)


def _usual_sampling(generation: GenerationConfig) -> Sampling:
    return Sampling(
        temperature=1.0 if generation.temperature is None else generation.temperature,
        top_p=1.0 if generation.top_p is None else generation.top_p,
        top_k=generation.top_k or 0,
    )
