"""Operating a training job: the driver that runs on the batch node, and the health checks inside each rank."""
