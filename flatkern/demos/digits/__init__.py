"""`python -m flatkern demo`: handwritten digits with every method. command.py is what it runs."""
