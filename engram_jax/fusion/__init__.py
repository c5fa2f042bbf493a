"""Stage 2, fusion: rows and a hidden state to a residual update."""
