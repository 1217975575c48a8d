"""One run that learns a word, behind Train Word."""
