"""Training regimes: who teaches whom, on what. One file each; a teacher's own training is the regime without one."""
