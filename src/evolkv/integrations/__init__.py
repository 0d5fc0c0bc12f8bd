"""EvolKV inside other people's programs. Each module needs the program it is for, and none is imported unasked."""
