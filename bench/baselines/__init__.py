"""What users write instead, and what other libraries offer, behind the three calls that one driver times."""
