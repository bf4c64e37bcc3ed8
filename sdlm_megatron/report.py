"""`python -m sdlm_megatron.report RUN`: one HTML page of a run over all its restarts."""
