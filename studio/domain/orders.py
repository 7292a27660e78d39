"""Orders: what a merge or a chat process is asked to do, the content of order.json."""

from typing import Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from studio.domain.section import Section
from studio.domain.spec import ModelRef
from studio.errors import InputError


class MergeOrder(Section):
    """Add an Adapter to its base, or take over the model that a run has trained as a whole.

    Attributes:
        model: The base.
        adapter: Folder of the Adapter in PEFT's layout; or else
        trained: Folder of the whole model, with the base's names of tensors and shards.
        run_id: Run that trained it.
    """

    version: Literal[1] = 1
    model: ModelRef
    adapter: str | None = Field(default=None, min_length=1)
    trained: str | None = Field(default=None, min_length=1)
    run_id: int = Field(ge=1)

    @model_validator(mode="after")
    def _one_result(self) -> Self:
        if (self.adapter is None) == (self.trained is None):
            raise ValueError("give adapter or trained: a Merge is of one of them")
        return self


class ChatOrder(Section):
    """Serve a base, and beside it what was trained on it.

    Attributes:
        method: What the run did, `auto` already decided: it gives the precision of the base, so
            that the Adapter meets what it was trained on. A run in full has no Adapter; both of
            its models are served in 16 bits.
        adapter: Folder of an Adapter, served as `tuned`.
        merged: Folder of a Merge, or of the model that a run trained as a whole, served as `tuned`
            in place of an Adapter.
        run_id: Run that trained it.
        token: What a client must send as `Authorization: Bearer TOKEN`.
        host: Address to listen on.
    """

    version: Literal[1] = 1
    model: ModelRef
    method: Literal["qlora", "lora", "full"]
    adapter: str | None = Field(default=None, min_length=1)
    merged: str | None = Field(default=None, min_length=1)
    run_id: int | None = Field(default=None, ge=1)
    token: str = Field(min_length=16, repr=False)
    host: str = Field(default="127.0.0.1", min_length=1)

    @model_validator(mode="after")
    def _one_tuned_model(self) -> Self:
        if self.adapter is not None and self.merged is not None:
            raise ValueError("adapter and merged are both given; a Chat serves one of them")
        return self


_Order = TypeVar("_Order", MergeOrder, ChatOrder)


def parse_order(kind: type[_Order], text: str) -> _Order:
    """Parse the text of an order.json.

    Raises:
        InputError: It is no such order; every wrong field is named, no value is repeated
            (a Chat's order holds its token).
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        found = [
            f"{'.'.join(str(part) for part in item['loc']) or 'order.json'}: {item['msg']}"
            for item in error.errors(include_input=False)
        ]
        raise InputError(
            f"The order cannot be read: {'; '.join(found)}.",
            "Start it again from the page; orders are written by the studio.",
        ) from error
