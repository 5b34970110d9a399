"""What faults cost a run, against Ray Train and torchft."""
