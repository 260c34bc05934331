"""Tasks to train for: loss, metric and prediction, and the commands that run them (Lightning)."""
