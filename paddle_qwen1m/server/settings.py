"""What an operator chooses about the server: one table for the command and README, each bound of a request among it."""

from __future__ import annotations

from dataclasses import dataclass

from paddle_qwen1m.options import Choice, Number, Option, Switch, Whole

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BYTES_PER_TOKEN = 16
"""A body may have so many for each token of max_model_len."""
WAITING_CONTEXTS = 8
API_KEY_VARIABLE = "PADDLE_QWEN1M_API_KEY"


@dataclass(frozen=True)
class Settings:
    """Fields with a name in SERVER_OPTIONS are described there; None for a bound that depends on max_model_len."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    open_metrics: bool = False
    log_requests: bool = False
    enable_force_include_usage: bool = False
    ping_seconds: float = 5.0
    ping: str = "comment"
    drain_seconds: float = 300.0
    max_body_bytes: int | None = None
    max_json_depth: int = 64
    max_choices: int = 128
    max_logprobs: int = 20
    max_stop_strings: int = 16
    max_stop_bytes: int = 1024
    max_listed: int = 4096
    max_tools: int = 128
    max_grammar_bytes: int = 64 * KIB
    grammar_seconds: float = 5.0
    max_prompt_logprobs_bytes: int = GIB
    max_waiting: int = 256
    max_waiting_tokens: int | None = None
    header_seconds: float = 10.0
    client_seconds: float = 60.0
    max_unread_bytes: int = 4 * MIB

    def __post_init__(self) -> None:
        for option in SERVER_OPTIONS:
            value = getattr(self, option.name)
            if value is not None:
                option.type.read(option.name, value)
        if not all(self.api_keys):
            raise ValueError("an API key must not be empty")

    def body_bytes(self, max_model_len: int) -> int:
        return self.max_body_bytes or BYTES_PER_TOKEN * max_model_len + MIB

    def waiting_tokens(self, max_model_len: int) -> int:
        return self.max_waiting_tokens or WAITING_CONTEXTS * max_model_len


SERVER_OPTIONS = (
    Option("port", Whole(0), "8000", "where it listens; 0 takes a free one"),
    Option("open_metrics", Switch(), "off", "/metrics needs no key"),
    Option("log_requests", Switch(), "off", "the log has prompts and answers, and the whole of internal errors"),
    Option("enable_force_include_usage", Switch(), "off", "streams end with the usage, whatever a request says"),
    Option("ping_seconds", Number(0, 5), "5", "most seconds between bytes of a stream"),
    Option(
        "ping",
        Choice(("comment", "chunk")),
        "comment",
        "what is sent then: a comment, or a chunk with `choices: []` for clients that count parsed events",
    ),
    Option("drain_seconds", Number(0), "300", "how long requests may go on after SIGTERM"),
    Option("max_body_bytes", Whole(1), f"{BYTES_PER_TOKEN} x max_model_len + 1 MiB", "bytes of a request's body"),
    Option("max_json_depth", Whole(1), "64", "how deep a body's JSON may be nested"),
    Option("max_choices", Whole(1), "128", "answers of a call, n for each of its prompts"),
    Option("max_logprobs", Whole(0), "20", "likeliest tokens that are told of each, at most 20"),
    Option("max_stop_strings", Whole(0), "16", "texts that end an answer, at most 16"),
    Option("max_stop_bytes", Whole(1), "1,024", "bytes of one of them, at most 1,024"),
    Option("max_listed", Whole(0), "4,096", "entries of logit_bias, bad_words and allowed_token_ids, at most 4,096"),
    Option("max_tools", Whole(0), "128", "tools of a call"),
    Option("max_grammar_bytes", Whole(1), "65,536", "bytes of a schema or a grammar"),
    Option("grammar_seconds", Number(0), "5", "how long one may take to compile"),
    Option(
        "max_prompt_logprobs_bytes",
        Whole(1),
        f"{GIB:,}",
        "memory for prompts' log-probabilities (prompt_logprobs, echo) of all calls together",
    ),
    Option("max_waiting", Whole(1), "256", "requests that wait"),
    Option("max_waiting_tokens", Whole(1), f"{WAITING_CONTEXTS} x max_model_len", "tokens of their prompts"),
    Option("header_seconds", Number(0), "10", "how long the head of a request may take"),
    Option("client_seconds", Number(0), "60", "how long a client may take nothing of a stream, or send nothing"),
    Option("max_unread_bytes", Whole(1), "4,194,304", "bytes of a stream that its client has not read"),
)
