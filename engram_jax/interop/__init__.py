"""Other people's checkpoints: read without copies, written in their layouts."""
