"""`python -m flatkern language`: a small Llama on bytes. command.py is what it runs."""
