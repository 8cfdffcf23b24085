"""The command line: Typer commands made from the typed configuration. Nothing here imports torch."""
