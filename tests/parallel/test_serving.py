"""Two ranks serve requests as one does: with pauses and aborts, in calls of all ranks and of rank 0 alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import serving_rank
from parallel_ranks import NEEDLE, launch


def test_two_ranks_give_what_one_gives_without_pauses(tmp_path: Path) -> None:
    status, output = launch(2, tmp_path / "logs", [Path(serving_rank.__file__), NEEDLE, tmp_path], 150)
    assert status == 0, output[-4000:]
    leader, follower = (json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    one = serving_rank.run(str(NEEDLE), paused=False)
    for name in ("generate", "heard", "afterwards", "last"):
        assert leader[name] == follower[name] == one["generate"], name
    for name in ("likelihoods", "progress", "logits"):
        assert leader[name] == follower[name], name
    assert leader["likelihoods"] == [12, 12, 12] and len(leader["progress"]) > 3
    np.testing.assert_allclose(leader["logits"], one["logits"], atol=1e-3)
    assert leader["alone"] == {name: one["alone"][name] for name in leader["alone"]} and len(leader["alone"]) > 5
    assert leader["errors"] == ["KeyboardInterrupt: enough", "ValueError: no more", "LookupError: the dog ate it"]
    assert follower["errors"] == [
        "KeyboardInterrupt: enough",
        "ValueError: no more",
        "RuntimeError: rank 0 ended the call: LookupError: the dog ate it",
    ]
