"""Networks of the value-factorisation learners."""
