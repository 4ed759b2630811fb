"""What a bulk job costs against the same load straight at the engine: `python -m bench.bulk`."""
