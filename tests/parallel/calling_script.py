"""A user's script, with no main guard: calling_script.py END, where END is `kill` or `return`."""

import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np

from paddle_qwen1m.engine import Request, SamplingParams, TokenChosen
from paddle_qwen1m.parallel.remote import start_engine

print("this script begins", flush=True)
os.close(0)
sys.stdin = None
engines = []
maker = threading.Thread(
    target=lambda: engines.append(start_engine("fine", {"tensor_parallel_size": 2}, worker="stub_worker")), daemon=True
)
maker.start()
maker.join()
(engine,) = engines
engine.add(Request("a", np.array([1]), SamplingParams(max_tokens=3)))
events = []
while not engine.is_idle:
    events += engine.step()
print("tokens:", [event.token for event in events if isinstance(event, TokenChosen)])
print("pids:", *(task.read_text() for task in Path("/proc/self/task").glob("*/children")), flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
