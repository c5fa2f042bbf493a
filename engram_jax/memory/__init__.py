"""Stage 1, retrieval: token ids to rows. It knows nothing of hidden states."""
