"""What a trained model holds and does: accounting, gates, pictures."""
