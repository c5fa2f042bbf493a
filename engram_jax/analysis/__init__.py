"""What a model holds, costs and does, before and after it is trained."""
