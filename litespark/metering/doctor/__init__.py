"""What `litespark doctor` looks at: each check of this machine, and of the nodes together."""
