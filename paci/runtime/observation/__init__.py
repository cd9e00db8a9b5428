"""What is measured: drift, times, memory, progress, links. Changes nothing that is computed."""
