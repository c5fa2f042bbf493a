"""Stage 1: token ids to rows.

It knows nothing of hidden states.
"""
