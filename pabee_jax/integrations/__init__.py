"""Adapters of `EarlyExitClassifier` for other libraries, which are installed separately."""
