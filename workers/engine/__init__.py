"""One training run. Knows JobSpec and a run folder, nothing else."""
