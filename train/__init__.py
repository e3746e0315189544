"""The application: configuration, command line and training loop, on top of the rest."""
