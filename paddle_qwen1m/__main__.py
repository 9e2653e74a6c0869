"""`python -m paddle_qwen1m` is the command paddle-qwen1m."""

from __future__ import annotations

import sys

from paddle_qwen1m.cli import main

if __name__ == "__main__":
    sys.exit(main())
