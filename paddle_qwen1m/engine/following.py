"""What rank 0 tells the ranks that follow it, as JSON has it: orders, events of a call that all make, its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Callable

from paddle_qwen1m.cache import CacheFull
from paddle_qwen1m.engine.admission import NotEnoughMemory
from paddle_qwen1m.engine.core import Completion, Event, Finished, Prefilled, TokenChosen, TokenLogprobs
from paddle_qwen1m.engine.orders import Order, from_message, to_message

Message = dict[str, Any]
ERRORS: dict[str, type[BaseException]] = {
    kind.__name__: kind for kind in (ValueError, NotEnoughMemory, CacheFull, KeyboardInterrupt)
}


def tell_orders(orders: Iterable[Order], events: Iterable[Event]) -> Message:
    """The next orders, and events that those before them have led to."""
    return {"orders": [to_message(order) for order in orders], "events": _tell_events(events)}


def tell_end(events: Iterable[Event], error: BaseException | None) -> Message:
    """The end of a call; `error` is what rank 0 raises."""
    reason = None if error is None else {"kind": type(error).__name__, "text": str(error)}
    return {"end": reason, "events": _tell_events(events)}


def read_orders(message: Message) -> list[Order]:
    return [from_message(order) for order in message.get("orders", ())]


def read_events(message: Message) -> list[Event]:
    return [_READERS[event["kind"]](event["values"]) for event in message.get("events", ())]


def read_error(message: Message) -> BaseException | None:
    """What a rank that follows raises at the end of a call: what rank 0 does, or a RuntimeError that says so."""
    reason = message["end"]
    if reason is None:
        return None
    if reason["kind"] in ERRORS:
        return ERRORS[reason["kind"]](reason["text"])
    return RuntimeError(f"rank 0 ended the call: {reason['kind']}: {reason['text']}")


def _tell_events(events: Iterable[Event]) -> list[Message]:
    """Those that a call of Engine.generate needs; logits are on every rank already."""
    return [
        {"kind": type(event).__name__, "values": asdict(event)} for event in events if type(event).__name__ in _READERS
    ]


def _token_chosen(values: Message) -> TokenChosen:
    return TokenChosen(**{**values, "logprobs": _likelihood(values["logprobs"])})


def _finished(values: Message) -> Finished:
    return Finished(values["id"], tuple(map(_completion, values["completions"])))


def _completion(values: Message) -> Completion:
    likelihoods = values["token_logprobs"]
    read = None if likelihoods is None else [TokenLogprobs(**_tuples(one)) for one in likelihoods]
    return Completion(**{**values, "token_logprobs": read})


def _likelihood(values: Message | None) -> TokenLogprobs | None:
    return None if values is None else TokenLogprobs(**_tuples(values))


def _tuples(values: Message) -> Message:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


_READERS: dict[str, Callable[[Message], Event]] = {
    "Prefilled": lambda values: Prefilled(**values),
    "TokenChosen": _token_chosen,
    "Finished": _finished,
}
