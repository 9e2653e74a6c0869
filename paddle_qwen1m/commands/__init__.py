"""The commands of paddle-qwen1m, a module each: `add_arguments` says what it takes, `run` does it."""

FAILED = 1
"""The exit status of a command that did not get there."""
