"""Stage 1, retrieval: token ids to rows, wherever these live.

It knows nothing of hidden states.
"""
