"""Other people's tools around an `EarlyExitClassifier`; each needs its own package installed."""
