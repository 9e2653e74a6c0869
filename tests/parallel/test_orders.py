"""Two ranks do what rank 0 orders and have the tokens that it chose, which are those of one rank."""

from __future__ import annotations

import json
from pathlib import Path

import orders_rank
from parallel_ranks import NEEDLE, launch


def test_ranks_that_follow_orders_decode_what_one_rank_does(tmp_path: Path) -> None:
    """Chunks of rows that do not divide, which stop at points or are dropped, heads, slots, a copied page: every order,
    as its message.
    """
    status, output = launch(2, tmp_path / "logs", [Path(orders_rank.__file__), NEEDLE, tmp_path], 120)
    assert status == 0, output[-4000:]
    leader, follower = (json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    long, short = leader["answers"]
    assert leader["ids"] == follower["ids"] == [long[-1], 0, short[-1], 0]
    assert orders_rank.run(str(NEEDLE))["answers"] == [long, short]
    assert len(long) == 13 and len(short) > 13 + 4
