"""What clients send, in OpenAI's names and those that vLLM and llama.cpp added; fields with other names are ignored."""

# ruff: noqa: UP007, UP045  pydantic evaluates annotations, on Python 3.9 too

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic import FailFast as _FailFast
from pydantic_core import from_json

from paddle_qwen1m.server.errors import ApiError, bad


class FailFast(_FailFast):  # type: ignore[misc]
    """The first error of a list is enough: there may be a million of them. Hashable, as `Optional` needs."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


Number = Optional[float]
Count = Optional[int]
Texts = Annotated[list[str], FailFast()]


class Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Model):
    include_usage: Optional[bool] = None


class JsonSchema(Model):
    name: Optional[str] = None
    strict: Optional[bool] = None
    schema_: Optional[dict[str, Any]] = Field(None, alias="schema")


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Optional[JsonSchema] = None


class StructuredOutputs(Model):
    json_: Union[str, dict[str, Any], None] = Field(None, alias="json")
    regex: Optional[str] = None
    choice: Optional[Texts] = None
    grammar: Optional[str] = None
    json_object: Optional[bool] = None
    structural_tag: Any = None


class Sampling(Model):
    """What chat and completions have in common."""

    model: Optional[str] = None
    n: Count = None
    max_tokens: Count = None
    min_tokens: Count = None
    temperature: Number = None
    top_p: Number = None
    top_k: Count = None
    min_p: Number = None
    presence_penalty: Number = None
    frequency_penalty: Number = None
    repetition_penalty: Number = None
    seed: Count = None
    stop: Union[str, Texts, None] = None
    stop_token_ids: Optional[Annotated[list[int], FailFast()]] = None
    include_stop_str_in_output: Optional[bool] = None
    ignore_eos: Optional[bool] = None
    skip_special_tokens: Optional[bool] = None
    logit_bias: Optional[dict[str, float]] = None
    allowed_token_ids: Optional[Annotated[list[int], FailFast()]] = None
    bad_words: Optional[Texts] = None
    prompt_logprobs: Count = None
    truncate_prompt_tokens: Count = None
    structured_outputs: Optional[StructuredOutputs] = None
    guided_json: Union[str, dict[str, Any], None] = None
    guided_regex: Optional[str] = None
    guided_choice: Optional[Texts] = None
    guided_grammar: Optional[str] = None
    response_format: Optional[ResponseFormat] = None
    stream: Optional[bool] = None
    stream_options: Optional[StreamOptions] = None
    return_progress: Optional[bool] = None
    return_token_ids: Optional[bool] = None
    return_tokens_as_token_ids: Optional[bool] = None
    cache_salt: Optional[str] = None
    request_id: Optional[str] = None
    best_of: Count = None
    chat_template: Any = None


class Part(Model):
    type: str
    text: Optional[str] = None
    refusal: Optional[str] = None


class CalledFunction(Model):
    name: str
    arguments: Union[str, dict[str, Any], None] = None


class ToolCall(Model):
    id: Optional[str] = None
    type: Optional[str] = None
    function: CalledFunction


class Message(Model):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Union[str, Annotated[list[Part], FailFast()], None] = None
    name: Optional[str] = None
    tool_calls: Optional[Annotated[list[ToolCall], FailFast()]] = None
    tool_call_id: Optional[str] = None


class Function(Model):
    name: str = Field(min_length=1, max_length=256)
    description: Optional[str] = None
    parameters: Optional[dict[str, Any]] = None
    strict: Optional[bool] = None


class Tool(Model):
    type: Literal["function"]
    function: Function


class FunctionName(Model):
    name: str


class NamedTool(Model):
    type: Literal["function"]
    function: FunctionName


class Templated(Model):
    """Messages and what their chat template takes."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    tools: Optional[Annotated[list[Tool], FailFast()]] = None
    documents: Optional[list[dict[str, Any]]] = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Optional[dict[str, Any]] = None
    chat_template: Any = None


class ChatRequest(Sampling, Templated):
    """POST /v1/chat/completions."""

    max_completion_tokens: Count = None
    logprobs: Optional[bool] = None
    top_logprobs: Count = None
    tool_choice: Union[Literal["none", "auto", "required"], NamedTool, None] = None
    parallel_tool_calls: Optional[bool] = None


class CompletionRequest(Sampling):
    """POST /v1/completions. prompt: a text, token ids, or a list of either, which `prompts` of calls.py reads."""

    prompt: Any = None
    logprobs: Count = None
    echo: Optional[bool] = None
    suffix: Optional[str] = None


class TokenizeRequest(Model):
    """POST /tokenize: `prompt`, or `messages` with what a chat template takes."""

    model: Optional[str] = None
    prompt: Optional[str] = None
    messages: Optional[Annotated[list[Message], FailFast(), Field(min_length=1)]] = None
    tools: Optional[Annotated[list[Tool], FailFast()]] = None
    add_special_tokens: Optional[bool] = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Optional[dict[str, Any]] = None
    return_token_strs: Optional[bool] = None
    chat_template: Any = None


class DetokenizeRequest(Model):
    """POST /detokenize."""

    model: Optional[str] = None
    tokens: Annotated[list[int], FailFast()]


Body = TypeVar("Body", bound=Model)


def read_json(raw: bytes, max_depth: int) -> dict[str, Any]:
    """The object that a body holds. ApiError 400 for what is no JSON, holds NaN or lone surrogates, or is too deep."""
    try:
        value = from_json(raw, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad("the body must be a JSON object")
    if _is_deeper(value, max_depth):
        raise bad(f"the body is nested deeper than {max_depth} (--max-json-depth)")
    return value


def read_body(kind: type[Body], raw: bytes, max_depth: int) -> Body:
    """The request in a body. ApiError 400 that names the field, and never quotes what it holds."""
    try:
        return kind.model_validate(read_json(raw, max_depth))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # The names of fields, and nothing that the client made up: keys of its own dicts are left out.
        known = _field_names(kind)
        place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in known)
        raise bad(f"{place or 'the body'}: {first['msg']}", place or None) from None


def check_template(request: Any) -> None:
    """ApiError for a chat template in a request, which would be a program of the client's."""
    if request.chat_template is not None:
        raise ApiError(400, "a chat template in a request is refused: start the server with --chat-template FILE",
                       "chat_template")  # fmt: skip


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inside = (child for one in level for child in (one.values() if isinstance(one, dict) else one))
        level = [child for child in inside if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _field_names(kind: type[BaseModel]) -> set[str]:
    names = set(kind.model_fields)
    for nested in (StreamOptions, JsonSchema, ResponseFormat, StructuredOutputs, Part, CalledFunction, ToolCall,
                   Message, Function, Tool, FunctionName, NamedTool):  # fmt: skip
        names |= {field.alias or name for name, field in nested.model_fields.items()}
    return names
