"""One command that measures co-serving on a GPU without weights and without a network: `python -m bench.gpu`."""
