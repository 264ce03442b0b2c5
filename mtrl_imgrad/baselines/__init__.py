"""Other people's algorithms in the same runs: same environments, evaluation and run folders as ours."""
