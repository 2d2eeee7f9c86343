from pathlib import Path

#: Absolute, because Hydra turns a relative path of a console script into an import name.
CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
