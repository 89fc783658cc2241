"""Pictures for people: learning curves, and label maps laid over frames."""
