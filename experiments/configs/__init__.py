"""Configs of the programs: `--config=experiments/configs/NAME.py`."""
