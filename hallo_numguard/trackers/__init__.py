"""Where figures go while training runs: trackers that a run has already. None of them is ever started here."""
