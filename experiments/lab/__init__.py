"""The paper's studies, each one program; see `study.py`."""
