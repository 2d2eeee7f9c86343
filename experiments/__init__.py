import atexit
import gc
import os
from pathlib import Path

#: An absolute path: Hydra turns the relative path of a console script into an import name.
CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"

# Set before any import of torch. Threads that spin while they wait made a model 8 times slower on
# cores that are shared with other processes.
for _name, _value in {
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "GOMP_SPINCOUNT": "0",
}.items():
    os.environ.setdefault(_name, _value)

# Python collects garbage once more when a program ends. With PyTorch's objects that takes over a
# second, and the system frees the memory anyway. Handlers that are registered later (W&B, PyTorch,
# multiprocessing) run before this one.
atexit.register(gc.freeze)
