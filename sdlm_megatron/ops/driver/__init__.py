"""The batch node's side of a job: submission, pre-flight, driver, requeues. Needs no torch."""
