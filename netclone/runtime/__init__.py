"""How a run is carried out, whatever the networks: devices, processes, progress, files that appear whole."""
