"""What other people's public bug reports do to this package, a file for each kind of fault, named by what it shows."""
