"""Run a schedule on tensors: stages, weight policies, transport and the loop over actions."""
