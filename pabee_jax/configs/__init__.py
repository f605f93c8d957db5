"""Configurations that `--config NAME` finds: demo, files and glue:TASK."""
