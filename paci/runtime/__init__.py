"""Where tensors start: stages, weight policies, transport, and the loop that runs a program."""
