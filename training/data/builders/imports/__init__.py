"""Import published data sets; importing.py is the entrance."""
