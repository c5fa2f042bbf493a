"""Training: the step that updates a backbone and the rows it touched."""
