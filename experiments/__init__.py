import atexit
import gc
import os
from pathlib import Path

#: Absolute, because Hydra turns a relative path of a console script into an import name.
CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"

# Before torch is imported anywhere: threads that spin while they wait made a model 8 times slower
# where cores are shared with other processes.
for _name, _value in {
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "GOMP_SPINCOUNT": "0",
}.items():
    os.environ.setdefault(_name, _value)

# Python looks for garbage once more when a program ends: among the objects of PyTorch that takes
# over a second, and the system frees the memory anyway. The handlers that are registered later,
# those of W&B, PyTorch and multiprocessing among them, run before this one.
atexit.register(gc.freeze)
