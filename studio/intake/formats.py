"""The formats of records, each recognised by its fields; two that fit are never guessed between."""

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from studio.domain.conversation import Kind
from studio.domain.section import Section
from studio.domain.validation import short
from studio.errors import InputError


class Format(Enum):
    """What the fields of a record mean."""

    OPENAI = "openai"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt_completion"
    PREFERENCE = "preference"
    TEXT = "text"
    COLUMNS = "columns"

    @property
    def title(self) -> str:
        """What a page calls it."""
        return _TITLES[self]

    @property
    def kind(self) -> Kind:
        """What its records become; columns may also become texts, as the Mapping says."""
        kinds = {Format.PREFERENCE: Kind.PREFERENCES, Format.TEXT: Kind.TEXTS}
        return kinds.get(self, Kind.CONVERSATIONS)

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields that are read; of COLUMNS they are in the Mapping."""
        return _FIELDS[self]


_TITLES = {
    Format.OPENAI: "OpenAI messages",
    Format.SHAREGPT: "ShareGPT",
    Format.ALPACA: "Alpaca",
    Format.PROMPT_COMPLETION: "prompt and completion",
    Format.PREFERENCE: "preference pairs",
    Format.TEXT: "plain text",
    Format.COLUMNS: "chosen columns",
}
# Names that question and answer have in public data sets: OpenAI's completions (prompt), GSM8K
# (question, answer), MetaMath (query, response), FLAN (input, target), OpenR1 (problem, solution).
QUESTIONS = ("prompt", "question", "query", "input", "problem", "user")
ANSWERS = ("completion", "response", "answer", "output", "target", "solution", "assistant")
# Alpaca's and Dolly's names for what a question is about.
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
REASONINGS = ("reasoning", "reasoning_content", "thinking")
TURNS = ("conversations", "conversation")
PICTURES = ("images", "image", "videos", "video", "audios", "audio")
PREFERRED = ("preferred_output", "non_preferred_output")
# Fields that are lists, or JSON text of one.
LISTS = ("messages", *TURNS, *PREFERRED)
_FIELDS: dict[Format, frozenset[str]] = {
    Format.OPENAI: frozenset(("messages", "tools", *PICTURES)),
    Format.SHAREGPT: frozenset((*TURNS, *SYSTEMS, "tools", *PICTURES)),
    Format.ALPACA: frozenset(
        ("instruction", "history", *CONTEXTS, *ANSWERS, *SYSTEMS, *REASONINGS, *PICTURES)
    ),
    Format.PROMPT_COMPLETION: frozenset(
        (*QUESTIONS, *ANSWERS, "context", *SYSTEMS, *REASONINGS, "tools", *PICTURES)
    ),
    Format.PREFERENCE: frozenset(
        (
            *("messages", "prompt", "chosen", "rejected", "input", "tools"),
            *(*PREFERRED, *SYSTEMS, *PICTURES),
        )
    ),
    Format.TEXT: frozenset(("text",)),
    Format.COLUMNS: frozenset(),
}
# `label` is read to tell unpaired preferences from prompt and completion.
KNOWN_FIELDS = frozenset().union(*_FIELDS.values()) | {"label"}
_EXPECTED = (
    "Expected is a list `messages` (OpenAI) or `conversations` (ShareGPT), or text under "
    "`instruction` and `output`, `prompt` and `completion`, `chosen` and `rejected`, or `text`; "
    "otherwise say which column holds the question and which the answer."
)


class UnknownFormatError(InputError):
    """The records are in no format known here; somebody may say what the columns mean.

    Args:
        message: One sentence: what is wrong.
        hint: One sentence: what to do.
        columns: Names of the fields, where a Mapping could help.
    """

    def __init__(self, message: str, hint: str, columns: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.columns = tuple(columns)

    @classmethod
    def of_columns(cls, columns: Sequence[str], missing: Sequence[str] = ()) -> Self:
        """Return the error of a table, in which chosen columns are missing or none is known."""
        what = f"The columns are {short(', '.join(columns), 300)}"
        if missing:
            names = short(", ".join(missing))
            return cls(f"{what}; {names} is not among them.", "Choose from these.", columns)
        return cls(f"{what}; their meaning is not known.", _EXPECTED, columns)


def recognise(values: Sequence[object]) -> Format:
    """Tell the format of a file from its first records.

    Where they differ it is that of most of them, of the first where as many are in another.

    Args:
        values: Some records, at least one; 20 are enough.

    Raises:
        UnknownFormatError: No record is in a format known here.
    """
    found = Counter(form for value in values if (form := format_of(value)) is not None)
    if found:
        return found.most_common(1)[0][0]
    raise _unknown(values)


def format_of(value: object) -> Format | None:
    """Return the format of one record, None where its fields are not known or fit two.

    A record with a preference is one even if it holds messages, a prompt or a text beside.
    """
    if not isinstance(value, dict):
        return None
    given = {key for key, field in value.items() if field is not None}
    if given >= {"chosen", "rejected"} or given >= set(PREFERRED):
        return Format.PREFERENCE
    if _is_unpaired(value):
        return None
    if "messages" in given:
        return Format.OPENAI
    if given & set(TURNS):
        return Format.SHAREGPT
    if "instruction" in given and len(given & set(ANSWERS)) == 1:
        return Format.ALPACA
    if len(given & set(QUESTIONS)) == 1 and len(given & set(ANSWERS)) == 1:
        return Format.PROMPT_COMPLETION
    if "text" in given and not given & {*QUESTIONS, *ANSWERS, "instruction"}:
        return Format.TEXT
    # Its `messages` is null: a record of this format with something wrong in it.
    return Format.OPENAI if "messages" in value else None


def _is_unpaired(value: dict[str, Any]) -> bool:
    """Whether an answer comes with a verdict (KTO): to learn the bad ones would be a silent fault."""
    return isinstance(value.get("label"), bool) and bool({"messages", *ANSWERS} & set(value))


def _unknown(values: Sequence[object]) -> UnknownFormatError:
    value = next((value for value in values if isinstance(value, dict)), None)
    if value is None:
        kind = _JSON_NAMES.get(type(values[0]), "values") if values else "missing"
        return UnknownFormatError(
            f"The records are {kind}, not objects.",
            'Write each as an object, as in {"messages": [...]}.',
        )
    if _is_unpaired(value):
        return UnknownFormatError(
            "The records are unpaired preferences: answers with a label of good or bad.",
            "Keep the good answers and leave `label` out.",
        )
    if isinstance(value.get("role"), str):
        return UnknownFormatError(
            "The records are single messages.",
            "Put those of one conversation into a list: a record is an object with `messages`.",
        )
    lists = [key for key, field in value.items() if _holds_records(field)]
    if lists and len(values) == 1:
        return UnknownFormatError(
            f"The file is one object; its records seem to stand in its list `{short(lists[0])}`.",
            "Save that list by itself.",
        )
    return UnknownFormatError.of_columns([str(key) for key in value])


def _holds_records(field: object) -> bool:
    return isinstance(field, list) and bool(field) and isinstance(field[0], dict)


_JSON_NAMES = {
    list: "lists",
    str: "texts",
    int: "numbers",
    float: "numbers",
    bool: "true or false",
    type(None): "null",
}


class Mapping(Section):
    """Which column of a table holds what: question and answer, or one text.

    Attributes:
        system: Column of the system message; an empty cell is none.
        user: Column of the question.
        assistant: Column of the answer.
        reasoning: Column of what the assistant thinks before it answers; an empty cell is none.
        text: Column of a text for continued pre-training.
    """

    system: str = Field(default="", title="System message")
    user: str = Field(default="", title="Question")
    assistant: str = Field(default="", title="Answer")
    reasoning: str = Field(default="", title="Thinking")
    text: str = Field(default="", title="Text")

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_empty(cls, value: object) -> object:
        return "" if value is None else value

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        others = self.system or self.user or self.assistant or self.reasoning
        if self.text and others:
            raise ValueError("choose a column for the text, or for question and answer, not both")
        if not self.text and not (self.user and self.assistant):
            raise ValueError("choose a column for the question and one for the answer")
        columns = self.columns
        if len(set(columns)) < len(columns):
            raise ValueError("each needs a column of its own")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        every = (self.system, self.user, self.assistant, self.reasoning, self.text)
        return tuple(column for column in every if column)

    @property
    def kind(self) -> Kind:
        """What the records become."""
        return Kind.TEXTS if self.text else Kind.CONVERSATIONS


_GUESSES = {
    "system": (*SYSTEMS, "persona"),
    "user": (*QUESTIONS, "instruction", "request", "human", "ask"),
    "assistant": (*ANSWERS, "reply", "gpt", "chosen", "result", "label"),
    "reasoning": (*REASONINGS, "thought", "cot", "rationale", "explanation"),
}
_TEXTS = ("text", "content", "document", "body", "article")


def guess_mapping(columns: Iterable[str]) -> Mapping | None:
    """Return the Mapping that names of columns suggest, None where they suggest none.

    It is for somebody to confirm: `Customer question` is taken for a question.
    """
    left = list(columns)
    found: dict[str, str] = {}
    for field, names in _GUESSES.items():
        column = _best(left, names)
        if column is not None:
            found[field] = column
            left.remove(column)
    if "user" in found and "assistant" in found:
        return Mapping(**found)
    text = _best(left, _TEXTS)
    return None if text is None else Mapping(text=text)


def _best(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column that is called so, or has such a word in it; earlier names come first."""
    words = {column: column.lower().replace("_", " ").replace("-", " ") for column in columns}
    for name in names:
        plain = name.replace("_", " ")
        for column, text in words.items():
            if text.strip() == plain:
                return column
    for name in names:
        for column, text in words.items():
            if name in text.split():
                return column
    return None
