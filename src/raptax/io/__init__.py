"""Files of weights, read in place. Untrusted input is checked here."""
