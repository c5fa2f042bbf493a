"""Text to batches: documents, tokenizer, packed windows."""
