"""How a run is carried out, whatever the networks: what makes two runs the same run."""
