"""What goes over the wire: the objects of the OpenAI API, as far as this server understands them.

A field that would change the answer and is not understood is refused; those that change nothing here are taken and not used.
Source: OpenAI API reference, "Chat" and "Completions"; ``top_k`` and ``repetition_penalty`` as vLLM and llama-server name them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema
from typing_extensions import NotRequired, TypedDict

from edgekv.settings import MOST_TOKENS, REPETITION_PENALTY, SEED, TEMPERATURE, TOP_K

#: More messages than any conversation has.
MOST_MESSAGES = 4096
MOST_TOOLS = 128
MOST_STOPS = 4
#: Of one of them: it is looked for at every token.
MOST_STOP_CHARACTERS = 1000
MOST_LOGPROBS = 20


class Asked(BaseModel):
    """A part of a request: unknown fields are refused, and nothing is read as another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Only:
    """Marks a field that takes what changes nothing, and says why it takes nothing else."""

    def __init__(self, *values: object, why: str) -> None:
        self._values = values
        self._why = why

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return how pydantic checks it."""
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return how it is described."""
        return {"enum": list(self._values)}

    def _check(self, value: object) -> object:
        if value not in self._values:
            raise ValueError(self._why)
        return value


# -- what is asked ---------------------------------------------------------------------------------------------------


Stop = Annotated[str, Field(max_length=MOST_STOP_CHARACTERS)]


class StreamOptions(Asked):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def _text_part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise ValueError(f"a part of the type {kind[:40]!r} is refused: the model of this server reads text only")
    return part


class TextPart(Asked):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Asked):
    """A function that the assistant called."""

    name: str
    arguments: str


class ToolCall(Asked):
    """A call of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


Content = str | list[Annotated[TextPart, BeforeValidator(_text_part)]]
_NO_AUDIO = Only(None, why="audio is refused: the model of this server reads and writes text only")


class Message(Asked):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MOST_TOOLS)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    audio: Annotated[Any, _NO_AUDIO] = None
    annotations: list[Any] | None = None
    function_call: Annotated[Any, Only(None, why="function_call was replaced by tool_calls")] = None

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the assistant has tool_calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of the role tool needs the tool_call_id that it answers")
        if self.content is None and not self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role} needs a content")
        return self


class Function(Asked):
    """A function that the assistant may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Asked):
    """A tool that the assistant may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(Asked):
    """The name of a function."""

    name: str


class NamedTool(Asked):
    """The tool that the assistant must use."""

    type: Literal["function"]
    function: NamedFunction


class Schema(Asked):
    """What an answer must be: a JSON schema, under a name."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Asked):
    """What an answer must be.

    ``value`` and ``schema_``: a schema as Hugging Face's client and llama.cpp's server have it, which call it ``json_object``.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None
    value: dict[str, Any] | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        if self.type != "json_object" and (self.value is not None or self.schema_ is not None):
            raise ValueError("value and schema go with the type json_object only")
        if self.value is not None and self.schema_ is not None:
            raise ValueError("value and schema are two names of one schema; give one of them")
        return self

    @property
    def wanted(self) -> dict[str, Any]:
        """The schema of the answer."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return next((schema for schema in (self.value, self.schema_) if schema is not None), {"type": "object"})


class Question(Asked):
    """What all requests have in common."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(default=None, ge=TEMPERATURE.least, le=TEMPERATURE.most)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=TOP_K.least, le=TOP_K.most)
    repetition_penalty: float | None = Field(default=None, ge=REPETITION_PENALTY.least, le=REPETITION_PENALTY.most)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=1024)
    seed: int | None = Field(default=None, ge=SEED.least, le=SEED.most)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Any, Only(None, 1, why="n must be 1: this server gives one answer to a request")] = None
    # Taken, and not used: they say nothing of the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _streamed(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true only")
        return self


#: What a template is given that is no setting of it.
_OWN_NAMES = frozenset(("self", "messages", "tools", "documents", "add_generation_prompt"))


class ChatQuestion(Question):
    """The body of a request for the next message of a conversation."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None  # taken, and not used: it only says what may be fast
    audio: Annotated[Any, _NO_AUDIO] = None
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=64)
    functions: Annotated[Any, Only(None, why="functions was replaced by tools")] = None
    function_call: Annotated[Any, Only(None, why="function_call was replaced by tool_choice")] = None
    reasoning_effort: Annotated[Any, Only(None, why="reasoning_effort is not understood by this server")] = None
    verbosity: Annotated[Any, Only(None, why="verbosity is not understood by this server")] = None
    web_search_options: Annotated[Any, Only(None, why="this server has no web search")] = None

    @model_validator(mode="after")
    def _together(self) -> ChatQuestion:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true only")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; give one of them")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice asks for a call, and there are no tools")
        taken = _OWN_NAMES.intersection(self.chat_template_kwargs or ())
        if taken:
            raise ValueError(f"chat_template_kwargs: {min(taken)} is given to every template by the server itself")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Of the answer; None: as many as fit."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class CompletionQuestion(Question):
    """The body of a request for a text that goes on."""

    prompt: str | list[str] | list[int]
    max_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    echo: Annotated[Any, Only(None, False, why="echo is refused: this server gives the answer alone")] = None
    suffix: Annotated[Any, Only(None, "", why="suffix is refused: this server does not fill in the middle")] = None
    best_of: Annotated[Any, Only(None, 1, why="best_of must be 1: this server gives one answer to a request")] = None

    @model_validator(mode="after")
    def _one(self) -> CompletionQuestion:
        if (
            isinstance(self.prompt, list)
            and len(self.prompt) != 1
            and any(isinstance(part, str) for part in self.prompt)
        ):
            raise ValueError("prompt must be one prompt: this server gives one answer to a request")
        return self


class EmbeddingQuestion(BaseModel):
    """The body of a request for embeddings, which this server has none of."""

    model_config = ConfigDict(extra="allow")


# -- what is told ----------------------------------------------------------------------------------------------------


class CachedTokens(TypedDict):
    """Of a prompt: tokens that did not have to be computed."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Likely(TypedDict):
    """A token and how likely it was; ``bytes`` is None where it is no whole character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Likely):
    """A token of an answer, and the likeliest in its place."""

    top_logprobs: list[Likely]


class ChatLogprobs(TypedDict):
    """The tokens of an answer or a part of it."""

    content: list[TokenLogprob]
    refusal: None


class FunctionCall(TypedDict):
    """A call in an answer; ``arguments`` is JSON. In a stream the name comes first."""

    name: NotRequired[str]
    arguments: str


class Call(TypedDict):
    """A call of the assistant; with an index, a part of it in a stream."""

    index: NotRequired[int]
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCall


class Said(TypedDict, total=False):
    """A message of the assistant, or the part of it that is new."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call]


class ChatChoice(TypedDict):
    """An answer in a conversation: the message, or in a stream the delta."""

    index: int
    message: NotRequired[Said]
    delta: NotRequired[Said]
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class CompletionLogprobs(TypedDict):
    """The tokens of a text, as the older API has them."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """A text that went on."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Reply(TypedDict):
    """What all answers have in common, whole ones and the parts of a stream."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    usage: NotRequired[Usage | None]


class ChatReply(Reply):
    """The answer in a conversation."""

    choices: list[ChatChoice]


class CompletionReply(Reply):
    """The answer to a prompt."""

    choices: list[CompletionChoice]


class ModelCard(TypedDict):
    """A model that can be asked; ``context_length``: tokens of prompt and answer together."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int


class ModelList(TypedDict):
    """The models that can be asked."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorFacts(TypedDict):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """What was wrong."""

    error: ErrorFacts
