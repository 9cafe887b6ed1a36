"""The sampling commands: argument parsing, calls into the library, output."""
