"""Looking into networks and runs: the two paths' weights, figures, the environment."""
