"""What a student learns from a teacher: one loss, one file."""
