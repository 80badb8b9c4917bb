"""Planning: the stages of a run, and how scores and a request become a plan, also by running models."""
