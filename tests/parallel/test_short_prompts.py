"""Ranks answer short prompts, together and alone, and beside a long one."""

from __future__ import annotations

import pytest
from short_prompts import wrong_answers


@pytest.mark.parametrize("degree", [1, 2])
def test_short_prompts_are_answered_together_alone_and_beside_a_long_one(degree: int) -> None:
    assert wrong_answers(degree, long_tokens=4000) == []
