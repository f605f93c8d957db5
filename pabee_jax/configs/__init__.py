"""Built-in configurations for `--config NAME`: demo, files and glue:TASK."""
