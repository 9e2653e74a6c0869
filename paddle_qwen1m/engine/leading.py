"""What rank 0 leads with while there is a cache: who holds its pages, what they know, who is next, what is chosen."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields

from paddle_qwen1m import ops
from paddle_qwen1m.cache import PagePool, PrefixIndex
from paddle_qwen1m.engine.choosing import Chooser
from paddle_qwen1m.engine.core import Event, Metrics
from paddle_qwen1m.engine.keeping import Keeper
from paddle_qwen1m.engine.scheduler import Scheduler
from paddle_qwen1m.engine.tasks import Task


@dataclass
class Lead:
    """It comes and goes with the cache. prefixes: None without a prefix cache; keeper: None without a prefix store."""

    pool: PagePool
    prefixes: PrefixIndex | None
    keeper: Keeper | None
    chooser: Chooser
    scheduler: Scheduler
    _posts: deque[tuple[Task, ops.Post]] = field(default_factory=deque)

    @property
    def has_posts(self) -> bool:
        """Whether the device owes the result of a task."""
        return bool(self._posts)

    def ran(self, task: Task, post: ops.Post | None) -> None:
        """Takes note of a task that the device was given; post: where its result will be, if it has one."""
        self.scheduler.ran(task, at_end=post is not None and post.done)
        if post is not None:
            self._posts.append((task, post))

    def collect(self, *, wait: bool) -> list[Event]:
        """What has come of tasks; the oldest is waited for, where there is one."""
        events: list[Event] = []
        while self._posts and (wait or self._posts[0][1].is_ready()):
            wait = False
            task, post = self._posts.popleft()
            events += self.scheduler.done(task, self.chooser.result(task, post.result()))
        return events

    def rest(self) -> None:
        """Without requests, what the device owes of some is forgotten."""
        self._posts.clear()
        self.scheduler.rest()

    def add_counters(self, metrics: Metrics) -> None:
        """Adds what the prefix index and the keeper of the store have counted."""
        if self.prefixes is not None:
            counters = self.prefixes.counters
            metrics.prefix_queried_tokens += counters.queried_tokens
            metrics.prefix_reused_tokens += counters.reused_tokens
            metrics.prefix_recut_tokens += counters.recut_tokens
        if self.keeper is not None:
            for one in fields(self.keeper.counters):
                name = f"store_{one.name}"
                setattr(metrics, name, getattr(metrics, name) + getattr(self.keeper.counters, one.name))
