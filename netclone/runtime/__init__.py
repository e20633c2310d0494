"""How a run is carried out, for any networks: devices, processes, progress, resuming, and writing files."""
