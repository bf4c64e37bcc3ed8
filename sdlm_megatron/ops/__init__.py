"""Operating a training job: driver/ on the batch node (no torch), node/ for the pre-flight, rank/ inside each rank."""
