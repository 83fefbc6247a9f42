"""Small helpers that know nothing of training: files, logging, environment."""
