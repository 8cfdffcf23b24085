"""One module per command: reads artifacts, runs the work, writes the result. ``run(settings, terminal, ...)`` each."""
