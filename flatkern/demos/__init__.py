"""What `python -m flatkern` runs to be looked at: trainings on digits and on bytes. Nothing else imports it."""
