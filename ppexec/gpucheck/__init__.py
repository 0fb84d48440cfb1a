"""GPU check: everything that only a GPU can show, in one command: `python -m ppexec.gpucheck`."""
