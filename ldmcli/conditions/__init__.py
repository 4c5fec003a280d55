"""What a model is conditioned on: rows of data and what people give, as values, specs and pictures."""
