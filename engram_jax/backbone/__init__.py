"""The mixture-of-experts transformer around the memory."""
